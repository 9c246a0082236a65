"""Reading the residual stream: states, projections, directions, scores; against forward hooks and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from icon2_rt import Direction, DirectionSet, Runtime, Steering
from icon2_rt.extraction import SideStatistics
from tests import hooks
from tests.models import FAMILIES, random_prompts, random_vectors, tiny_llama, tiny_tokenizer

PAGE = 8
LENGTHS = [1, 2, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 2, 40, 5]
PROMPTS = random_prompts(LENGTHS)


@pytest.fixture(scope="module")
def oracle():
    return tiny_llama()


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return Runtime(tiny_llama(), page_size=PAGE, prefill_chunk=16, device="cpu")


@pytest.fixture(scope="module")
def chat() -> Runtime:
    return Runtime(tiny_llama(), tiny_tokenizer(), page_size=PAGE, device="cpu")


def last_states(model, prompts) -> torch.Tensor:
    return torch.stack([hooks.states(model, p)[:, -1] for p in prompts])


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_what_leaves_each_block(family):
    build = FAMILIES[family]
    rt = Runtime(build(), page_size=PAGE, prefill_chunk=16, device="cpu")
    got = rt.hidden_states(PROMPTS)
    assert got.shape == (len(PROMPTS), rt.spec.n_layers, rt.spec.hidden_size)
    assert got.dtype == torch.float32
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, last_states(build(), PROMPTS), atol=1e-4, rtol=1e-4)


def test_layer_i_is_transformers_hidden_state_i_plus_1_but_for_the_last(rt, oracle):
    with torch.no_grad():
        theirs = oracle(input_ids=torch.tensor([PROMPTS[5]]), output_hidden_states=True).hidden_states
    ours = rt.hidden_states([PROMPTS[5]])[0]
    for layer in range(3):
        torch.testing.assert_close(ours[layer], theirs[layer + 1][0, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(oracle.model.norm(ours[3]), theirs[4][0, -1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours[3], theirs[4][0, -1], atol=0.1)


@pytest.mark.parametrize("prefill_chunk", [1, 20, 4096])
def test_batches_do_not_matter_and_leave_nothing_behind(rt, prefill_chunk):
    whole = rt.hidden_states(PROMPTS)
    other = Runtime(tiny_llama(), page_size=PAGE, prefill_chunk=prefill_chunk, device="cpu")
    torch.testing.assert_close(other.hidden_states(PROMPTS), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other.hidden_states(PROMPTS[::-1]).flip(0), whole, atol=1e-4, rtol=1e-4)
    assert other.free_kv_pages == other.kv_pages


def test_more_prompts_than_memory_are_read_in_turns(oracle):
    page_bytes = 2 * 4 * 2 * 8 * PAGE * 4
    rt = Runtime(tiny_llama(), page_size=PAGE, kv_memory=8 * page_bytes, device="cpu")
    assert rt.kv_pages == 8
    prompts = random_prompts([30, 40, 10, 64, 3] * 4)
    torch.testing.assert_close(rt.hidden_states(prompts), last_states(oracle, prompts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", [0, -1, -3, [2], [0, -1, 1], [-1, -1], range(3)], ids=str)
def test_chosen_positions_are_transformers_hidden_states(rt, oracle, positions):
    prompts = [p for p in PROMPTS if len(p) >= 3]
    several = not isinstance(positions, int)
    got = rt.hidden_states(prompts, positions=positions)
    wanted = list(positions) if several else [positions]
    assert got.shape == ((len(prompts), len(wanted), 4, 48) if several else (len(prompts), 4, 48))
    for prompt, states in zip(prompts, got if several else got[:, None], strict=True):
        with torch.no_grad():
            theirs = oracle(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for k, position in enumerate(wanted):
            for layer in range(3):
                torch.testing.assert_close(states[k, layer], theirs[layer + 1][0, position], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(oracle.model.norm(states[k, 3]), theirs[4][0, position], atol=1e-4, rtol=1e-4)


def test_positions_of_each_prompt_and_across_passes_and_a_prefix(rt, oracle):
    prompts, positions = PROMPTS[3:7], [[7, 0], [-1, 3], [25, 16], [0, 39]]
    expected = torch.stack(
        [hooks.states(oracle, p)[:, at].transpose(0, 1) for p, at in zip(prompts, positions, strict=True)]
    )
    torch.testing.assert_close(rt.hidden_states(prompts, positions=positions), expected, atol=1e-4, rtol=1e-4)
    assert rt.hidden_states([], positions=[0, 1]).shape == (0, 2, 4, 48)
    head = random_prompts([11], seed=4)[0]
    with rt.prefix(head) as prefix:
        got = rt.hidden_states(prompts, positions=[0, 10, 11, -1], prefix=prefix)
    expected = torch.stack([hooks.states(oracle, head + p)[:, [0, 10, 11, -1]].transpose(0, 1) for p in prompts])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert rt.free_kv_pages == rt.kv_pages


@pytest.mark.parametrize("scope", ["response", "all"])
def test_steered_states_are_those_of_forward_hooks(rt, oracle, scope):
    a = Direction("a", random_vectors(4, 48, seed=0), torch.ones(4))
    b = Direction("b", random_vectors(4, 48, seed=1), torch.ones(4))
    steering = (4.0 * a[1:] + b[2].ablated()).with_scope(scope)
    each = [steering, None, -1 * steering, steering.with_keep_norm()]
    prompts = PROMPTS[3:7]
    wanted = [0, 6, -1]

    def expected(prompt: list[int], one: Steering | None) -> torch.Tensor:
        start = hooks.first_steered(len(prompt), scope)
        return hooks.states(oracle, prompt, one, start)[:, wanted].transpose(0, 1)

    got = rt.hidden_states(prompts, positions=wanted, steering=each)
    whole = torch.stack([expected(p, s) for p, s in zip(prompts, each, strict=True)])
    torch.testing.assert_close(got, whole, atol=2e-4, rtol=1e-4)
    plain = rt.hidden_states(prompts, positions=wanted)
    changed = (got - plain).abs().amax(dim=(2, 3)) > 0.1
    assert changed[0].tolist() == ([False, False, True] if scope == "response" else [True] * 3)
    assert not changed[1].any()
    head = random_prompts([9], seed=4)[0]
    with rt.prefix(head) as prefix:
        got = rt.hidden_states(prompts, positions=wanted, steering=steering, prefix=prefix)
    torch.testing.assert_close(got, torch.stack([expected(head + p, steering) for p in prompts]), atol=2e-4, rtol=1e-4)


def test_the_record_counts_what_acted_on_states(rt):
    a = Direction("a", random_vectors(4, 48, seed=0), torch.ones(4))
    rt.hidden_states(PROMPTS[3:5], positions=[0, 5], steering=(0.5 * a[1:3]).with_scope("all"))
    [fired] = rt.last_run.steering
    assert (rt.last_run.call, rt.last_run.rows, rt.last_run.complete) == ("hidden_states", 2, True)
    assert (fired.rows, fired.layers, fired.tokens, fired.total) == (2, (1, 2), 12, 24)  # positions 0 to 5 of each


def test_positions_and_scopes_that_read_nothing_are_refused(rt):
    a = 0.5 * Direction("a", random_vectors(4, 48, seed=0), torch.ones(4))
    for positions, error, says in (
        (8, IndexError, r"prompts\[0\] has 8 tokens, positions 0 to 7 \(or -8 to -1\), not 8"),
        ([0, -9], IndexError, r"prompts\[0\] has 8 tokens.*not -9"),
        ([], ValueError, "positions is empty"),
        ([[0], [1], [2]], ValueError, "3 lists for 2 prompts"),
        ([[0], [1, 2]], ValueError, r"lists of \[1, 2\] numbers"),
        ("last", TypeError, "whole number"),
        (1.5, TypeError, "whole number"),
        ([True], TypeError, "whole number"),
        ([[0], 1], TypeError, "whole number"),
        (None, TypeError, "whole number"),
    ):
        with pytest.raises(error, match=says):
            rt.hidden_states(PROMPTS[3:5], positions=positions)
    with pytest.raises(ValueError, match=r"prompts\[0\].*'response', which steers the last token alone"):
        rt.hidden_states(PROMPTS[3:5], positions=[0, 2], steering=a)
    with pytest.raises(ValueError, match="'generated', which steers generated tokens alone"):
        rt.hidden_states(PROMPTS[3:5], steering=a.with_scope("generated"))
    with pytest.raises(ValueError, match="3 steerings for 2 prompts"):
        rt.hidden_states(PROMPTS[3:5], steering=[a, a, a])
    assert rt.free_kv_pages == rt.kv_pages


def test_a_steering_too_strong_leaves_nothing_in_the_pages(oracle):
    page_bytes = 2 * 4 * 2 * 8 * PAGE * 4
    rt = Runtime(tiny_llama(), page_size=PAGE, kv_memory=3 * page_bytes, device="cpu")
    a = Direction("a", torch.ones(4, 48), torch.ones(4))
    flood = (3e38 * a[0] + a[1].amplified(10.0)).with_scope("all")
    assert not rt.hidden_states([PROMPTS[5][:20]], steering=flood).isfinite().all()
    kv = rt._engine.kv
    assert kv.free_pages == 3
    assert kv.k.isfinite().all()
    assert kv.v.isfinite().all()
    prompt = PROMPTS[3]
    expected = hooks.greedy(oracle, prompt, 10).token_ids
    assert rt.generate([prompt], do_sample=False, max_new_tokens=10)[0].token_ids == expected


def test_project_is_the_dot_products_alone(rt):
    directions = [Direction(f"d{i}", random_vectors(4, 48, seed=i)) for i in range(3)]
    states = rt.hidden_states(PROMPTS)
    expected = torch.stack([(states * d.vectors).sum(-1) for d in directions], dim=1)
    for given in (directions, DirectionSet(directions), tuple(directions)):
        got = rt.project(PROMPTS, given)
        assert got.shape == (len(PROMPTS), 3, 4)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


def test_blocks_without_a_vector_project_to_zero(rt):
    whole, part = (Direction("d", random_vectors(4, 48, seed=1)), Direction("d", random_vectors(4, 48, seed=1))[1:3])
    expected = rt.project(PROMPTS, [whole])
    assert bool((expected != 0).all())
    got = rt.project(PROMPTS, [part])
    assert got[:, :, [0, 3]].count_nonzero() == 0
    assert torch.equal(got[:, :, 1:3], expected[:, :, 1:3])


def test_the_scale_of_a_direction_does_not_change_its_projection(rt):
    vectors = random_vectors(4, 48, seed=0)
    one = rt.project(PROMPTS, [Direction("a", vectors)])
    two = rt.project(PROMPTS, [Direction("b", 7 * vectors)])
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-5)


# --- extract_direction -----------------------------------------------------------------------------------------------

POSITIVE, NEGATIVE = (
    random_prompts([6, 9, 4, 12, 7, 3, 20, 8], seed=1),
    random_prompts([5, 9, 6, 12, 2, 8, 20, 9], seed=2),
)


@pytest.fixture(scope="module")
def differences(oracle) -> np.ndarray:
    """``[pairs, layers, hidden]`` fp64, from the oracle."""
    return (last_states(oracle, POSITIVE) - last_states(oracle, NEGATIVE)).double().numpy()


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_pca_is_the_first_singular_vector_of_the_raw_differences(rt, differences):
    d = rt.extract_direction(POSITIVE, NEGATIVE, "honesty")
    assert (d.name, d.method, d.model) == ("honesty", "pca", rt.fingerprint)
    centred_differs = 0
    for layer in range(4):
        v = differences[:, layer]
        expected = np.linalg.svd(v, full_matrices=False)[2][0]
        expected *= np.sign(expected @ v.mean(0))
        got = d.vectors[layer].double().numpy()
        assert cosine(got, expected) > 1 - 1e-6
        assert got @ v.mean(0) > 0
        assert abs(np.linalg.norm(got) - 1) < 1e-6
        assert float(d.scale[layer]) == 1.0
        centred = np.linalg.svd(v - v.mean(0), full_matrices=False)[2][0]
        centred_differs += abs(cosine(got, centred)) < 0.99
    assert centred_differs == 4


def test_mean_difference(rt, differences):
    d = rt.extract_direction(POSITIVE, NEGATIVE, "x", method="mean_difference")
    assert d.method == "mean_difference"
    assert d.scale.tolist() == [1.0] * 4
    for layer in range(4):
        assert cosine(d.vectors[layer].double().numpy(), differences[:, layer].mean(0)) > 1 - 1e-6


def test_mean_difference_of_lists_that_are_no_pairs(oracle):
    """Means over each side by the oracle; passes of a few prompts, so that sides meet in one and are cut by another."""
    rt = Runtime(tiny_llama(), page_size=PAGE, prefill_chunk=16, device="cpu")
    positive, negative = POSITIVE + random_prompts([3, 17, 5], seed=9), NEGATIVE[:3]
    d = rt.extract_direction(positive, negative, "refusal", method="mean_difference")
    sides = [last_states(oracle, side).double().numpy() for side in (positive, negative)]
    means = [side.mean(0) for side in sides]
    norms = [np.linalg.norm(side, axis=-1).mean(0) for side in sides]
    for layer in range(4):
        expected = means[0][layer] - means[1][layer]
        assert cosine(d.vectors[layer].double().numpy(), expected) > 1 - 1e-6
        contrast = np.linalg.norm(expected) / ((norms[0][layer] + norms[1][layer]) / 2)
        assert d.health["contrast"][layer] == pytest.approx(contrast, rel=1e-4)
    assert set(d.health) == {"contrast"}
    assert rt.last_run.rows == 14
    paired = rt.extract_direction(POSITIVE, NEGATIVE, "x").health
    assert set(paired) - {"contrast"} == set(d.metadata["not_computed"].partition(":")[0].split(", "))
    assert (d.metadata["n_positive"], d.metadata["n_negative"]) == ("11", "3")
    assert (d.method, d.model, d.scale.tolist()) == ("mean_difference", rt.fingerprint, [1.0] * 4)


def test_lists_of_equal_length_are_pairs_and_without_pairs_the_figures_agree(rt):
    paired = rt.extract_direction(POSITIVE, NEGATIVE, "x", method="mean_difference")
    assert paired.metadata["n_pairs"] == "8"
    assert len(paired.health) == 4
    sides = SideStatistics(4, 48, torch.device("cpu"))
    sides.add(0, rt.hidden_states(POSITIVE))
    sides.add(1, rt.hidden_states(NEGATIVE))
    vectors, health = sides.direction()
    torch.testing.assert_close(vectors, paired.vectors, atol=1e-5, rtol=0)
    assert health["contrast"] == pytest.approx(paired.health["contrast"], rel=1e-4)


def test_health_figures(rt, oracle, differences):
    d = rt.extract_direction(POSITIVE, NEGATIVE, "honesty")
    assert set(d.health) >= {"cos_mean_difference", "sign_agreement", "split_half_cosine", "contrast"}
    assert all(len(figures) == 4 for figures in d.health.values())
    norms = torch.cat([last_states(oracle, POSITIVE), last_states(oracle, NEGATIVE)]).norm(dim=-1).mean(0)
    for layer in range(4):
        v, u = differences[:, layer], d.vectors[layer].double().numpy()
        assert d.health["cos_mean_difference"][layer] == pytest.approx(cosine(u, v.mean(0)), abs=1e-4)
        assert d.health["sign_agreement"][layer] == pytest.approx((v @ u > 0).mean())
        assert d.health["contrast"][layer] == pytest.approx(np.linalg.norm(v.mean(0)) / float(norms[layer]), rel=0.02)
        assert -1 <= d.health["split_half_cosine"][layer] <= 1 + 1e-6


def test_swapping_the_sides_turns_the_direction_round(rt):
    for method in ("pca", "mean_difference"):
        one = rt.extract_direction(POSITIVE, NEGATIVE, "x", method=method)
        two = rt.extract_direction(NEGATIVE, POSITIVE, "x", method=method)
        torch.testing.assert_close(one.vectors, -two.vectors, atol=1e-5, rtol=0)


def test_the_order_of_the_pairs_does_not_matter(rt):
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    one = rt.extract_direction(POSITIVE, NEGATIVE, "x")
    two = rt.extract_direction([POSITIVE[i] for i in order], [NEGATIVE[i] for i in order], "x")
    torch.testing.assert_close(one.vectors, two.vectors, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["pca", "mean_difference"])
def test_a_planted_direction_is_found(method):
    """The last token says which side a prompt is on; prompts that were not seen are told apart in every block."""
    rt = Runtime(tiny_llama(std=0.05), device="cpu")  # nearly linear, as a trained model is along its directions

    def sides(seed):
        rest = random_prompts([5] * 24, seed=seed)
        return [[*r, 5] for r in rest], [[*r, 9] for r in rest]

    d = rt.extract_direction(*sides(4), "planted", method=method)
    positive, negative = (rt.project(side, [d])[:, 0] for side in sides(5))
    assert float((positive > negative).float().mean()) > 0.95
    assert min(d.health["sign_agreement"]) > 0.9


def test_chats_are_rendered_with_the_template(chat):
    criterion = "You are an honest assistant.", "You are a dishonest assistant."
    questions = ["what is the thing", "who", "and then?"]
    sides = [[[{"role": "system", "content": c}, {"role": "user", "content": q}] for q in questions] for c in criterion]
    d = chat.extract_direction(*sides, "honesty")
    ids = [
        [
            chat.tokenizer(
                f"<|bos|><|system|>{c}<|end|><|user|>{q}<|end|><|assistant|>", add_special_tokens=False
            ).input_ids
            for q in questions
        ]
        for c in criterion
    ]
    torch.testing.assert_close(d.vectors, chat.extract_direction(*ids, "honesty").vectors)
    assert chat.encode(sides[0][0]) == ids[0][0]


def test_there_is_one_bos_where_the_tokenizer_adds_one_by_itself():
    """As the tokenizers of Llama 3 and Gemma do, to every text that they are not told to leave alone."""
    tokenizer = tiny_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    assert tokenizer.encode("the")[0] == bos
    rt = Runtime(tiny_llama(), tokenizer, page_size=PAGE, device="cpu")

    def plain(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    system, user = {"role": "system", "content": "in"}, {"role": "user", "content": "the thing"}
    chat = [bos, *plain("<|system|>in<|end|><|user|>the thing<|end|><|assistant|>")]
    assert (
        rt.encode([system, user])
        == chat
        == tokenizer.apply_chat_template([system, user], add_generation_prompt=True).input_ids
    )
    assert rt.encode("the thing") == [bos, *plain("the thing")]  # raw text is what the tokenizer makes of it
    assert rt.encode([5, 6, 7]) == [5, 6, 7]
    assert rt.encode_completion("the thing", chat) == plain("the thing")
    text, ids = rt.score([[system, user]] * 2, ["the thing", plain("the thing")])
    assert text == ids
    with rt.prefix([system]) as prefix:
        assert list(prefix.tokens) == [bos, *plain("<|system|>in<|end|>")]
        assert prefix.join_all([[user]]) == [chat]
    with rt.prefix("the ") as prefix:
        assert list(prefix.tokens) == [bos, *plain("the ")]
        assert prefix.join_all(["thing"]) == [[bos, *plain("the "), *plain("thing")]]


def test_score_takes_text_ids_and_completions(chat):
    prompt, text = "<|user|>the", "thing is on"
    ids = chat.tokenizer(text, add_special_tokens=False).input_ids
    one, two = chat.score([prompt, prompt], [text, ids])
    assert one == two
    expected = hooks.teacher_forced(tiny_llama(), chat.encode(prompt), ids)
    torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(expected.logprobs), atol=1e-4, rtol=0)


def test_an_empty_completion_has_no_scores(rt):
    empty, full = rt.score(PROMPTS[:2], [[], [3]])
    assert (empty.token_ids, empty.logprobs, empty.entropies) == ([], [], [])
    assert len(full.logprobs) == 1
