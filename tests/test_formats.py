"""Direction files: what was saved comes back, other tools find it where they look, and a bad file says what is bad."""

from __future__ import annotations

import json
import os
import pickle
import random
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from icon2_rt import formats
from icon2_rt.atomic import replacing
from icon2_rt.steering import Direction, DirectionSet

N_LAYERS, HIDDEN = 6, 16


def direction(name: str = "honesty", seed: int = 0, scale: list[float] | None = None, **extra) -> Direction:
    vectors = torch.randn(N_LAYERS, HIDDEN, generator=torch.Generator().manual_seed(seed))
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    return Direction(name, vectors, torch.ones(N_LAYERS) if scale is None else torch.tensor(scale), **extra)


def described(name: str = "honesty", seed: int = 0, **extra) -> Direction:
    return direction(
        name,
        seed,
        model="0123abcd",
        model_name="some/model",
        method="pca",
        health={"sign_agreement": [0.1 * i for i in range(N_LAYERS)], "contrast": [1 / 3] * N_LAYERS},
        metadata={"n_pairs": "128", "note": "Grüße, 你好 \n"},
        **extra,
    )


def assert_same(a: Direction, b: Direction) -> None:
    assert torch.equal(a.vectors, b.vectors)
    assert_same_but_vectors(a, b)


def assert_same_but_vectors(a: Direction, b: Direction) -> None:
    assert torch.equal(a.scale, b.scale)
    for field in ("name", "model", "model_name", "method", "health", "metadata"):
        assert getattr(a, field) == getattr(b, field), field


# --- safetensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "saved",
    [
        direction(),
        described(),
        direction(scale=[0.0, 0.3, -2.0, 1.0, 1e-6, 7e5]),
        described()[2:4],
        Direction("raw lengths", torch.randn(N_LAYERS, HIDDEN) * 37),
        Direction("zero rows", torch.cat([torch.zeros(2, HIDDEN), torch.randn(4, HIDDEN)])),
        direction('name.with.vectors/ünïcode "quotes" 🙂'),
    ],
    ids=lambda d: d.name,
)
def test_safetensors_round_trip_is_equality(saved: Direction, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    saved.save(path)
    assert_same(saved, Direction.load(path))


def test_a_set_keeps_its_order_and_everything_in_it(tmp_path: Path) -> None:
    saved = DirectionSet([described("z", 1), direction("a", 2, scale=[0, 0, 0, 5, 0, 0]), described("m", 3)])
    saved.save(tmp_path / "set.safetensors")
    loaded = DirectionSet.load(tmp_path / "set.safetensors")
    assert loaded.names == ["z", "a", "m"]
    for a, b in zip(saved, loaded, strict=True):
        assert_same(a, b)


def test_one_direction_of_several_is_not_guessed(tmp_path: Path) -> None:
    DirectionSet([direction("a"), direction("b", 1)]).save(tmp_path / "set.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 directions \['a', 'b'\]"):
        Direction.load(tmp_path / "set.safetensors")


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_same_directions_same_bytes(suffix: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}{suffix}" for i in range(4)]
    for path in paths:
        described()[1:].save(path)
    assert len({path.read_bytes() for path in paths}) == 1


def test_safetensors_says_what_its_rows_mean(tmp_path: Path) -> None:
    described().save(tmp_path / "d.safetensors")
    with safe_open(tmp_path / "d.safetensors", framework="np") as file:
        content = json.loads(file.metadata()["icon2_rt"])
    assert "after decoder block i (0-based)" in content["layers"]
    (entry,) = content["directions"]
    assert entry["name"] == "honesty"
    assert entry["model"] == "0123abcd"
    assert entry["method"] == "pca"
    assert entry["health"]["contrast"] == [1 / 3] * N_LAYERS


# --- GGUF ------------------------------------------------------------------------------------------------------------


def as_llama_cpp(path: Path, n_layers: int) -> dict[int, np.ndarray]:
    """0-based block → what llama.cpp adds to its output, by the arithmetic of its loader and its adapter."""
    flat = np.zeros(0, dtype=np.float32)
    width = None
    for tensor in gguf.GGUFReader(path).tensors:
        prefix, _, number = tensor.name.partition(".")
        assert prefix == "direction"
        assert int(number) > 0
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert len(tensor.shape) == 1
        width = width or tensor.n_elements
        assert tensor.n_elements == width
        flat.resize(max(len(flat), width * int(number)), refcheck=False)
        flat[width * (int(number) - 1) :][:width] += tensor.data
    blocks = range(1, n_layers)
    return {il: flat[width * (il - 1) :][:width] for il in blocks if width * il <= len(flat)}


def as_repeng(path: Path) -> tuple[str, dict[int, np.ndarray]]:
    """The model hint and 0-based block → vector, by the keys that repeng's importer looks up."""
    reader = gguf.GGUFReader(path)
    assert bytes(reader.get_field("general.architecture").parts[-1]) == b"controlvector"
    hint = str(bytes(reader.get_field("controlvector.model_hint").parts[-1]), "utf-8")
    named = {t.name: t.data for t in reader.tensors if t.name.startswith("direction.")}
    return hint, {int(name.split(".")[1]): data for name, data in named.items()}


def foreign(
    path: Path, tensors: dict[str, np.ndarray], layer_count: int | None = None, architecture="controlvector", **kv
):
    """A control vector as another tool would write it."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"controlvector.model_hint": "llama", **kv}.items():
        writer.add_string(key.replace("__", "."), value)
    if layer_count is not None:
        writer.add_uint32("controlvector.layer_count", layer_count)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rows(*numbers: int, length: float = 3.0, width: int = HIDDEN) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    drawn = {f"direction.{n}": generator.standard_normal(width).astype(np.float32) for n in numbers}
    return {name: row * np.float32(length / np.linalg.norm(row)) for name, row in drawn.items()}


def test_llama_cpp_and_repeng_find_row_i_at_block_i(tmp_path: Path) -> None:
    saved = direction(scale=[0.0, 0.5, 0.0, -2.0, 0.3, 1.0])
    saved.save(tmp_path / "d.gguf")
    expected = saved.vectors * saved.scale[:, None]
    applied = as_llama_cpp(tmp_path / "d.gguf", N_LAYERS)
    assert sorted(applied) == [1, 2, 3, 4, 5]
    for block, row in applied.items():
        np.testing.assert_allclose(row, expected[block], rtol=1e-6, atol=0)
    hint, by_block = as_repeng(tmp_path / "d.gguf")
    assert hint == "unknown"
    assert sorted(by_block) == [1, 3, 4, 5]
    for block, row in by_block.items():
        np.testing.assert_allclose(row, expected[block], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [[0, 1, 1, 1, 1, 1], [0, 0, 0.5, -1, 4, 0], [0, 0, 0, 0, 2, 0]])
def test_gguf_round_trip_is_equality_for_powers_of_two(scale: list[float], tmp_path: Path) -> None:
    saved = described(scale=[float(s) for s in scale])
    saved.save(tmp_path / "d.gguf")
    loaded = Direction.load(tmp_path / "d.gguf")
    assert_same_but_vectors(saved, loaded)
    assert torch.equal(saved.vectors[saved.layers], loaded.vectors[saved.layers])


def test_gguf_round_trip_of_any_scale_keeps_all_but_the_last_bit(tmp_path: Path) -> None:
    saved = described(scale=[0.0, 0.3, -1.7, 1e-4, 3e4, 0.0])
    saved.save(tmp_path / "d.gguf")
    loaded = Direction.load(tmp_path / "d.gguf")
    assert_same_but_vectors(saved, loaded)
    torch.testing.assert_close(saved.vectors[saved.layers], loaded.vectors[saved.layers], rtol=2.4e-7, atol=0)


def test_gguf_hint_is_the_recorded_one_or_the_models_name(tmp_path: Path) -> None:
    described()[1:].save(tmp_path / "d.gguf")
    assert as_repeng(tmp_path / "d.gguf")[0] == "some/model"
    direction(metadata={"model_hint": "qwen2"}, model_name="x")[1:].save(tmp_path / "d.gguf")
    assert as_repeng(tmp_path / "d.gguf")[0] == "qwen2"


# repeng counts the tensors it writes (blocks 1 to n - 1), others write the number of blocks, llama.cpp reads neither.
@pytest.mark.parametrize("layer_count", [N_LAYERS - 1, N_LAYERS, None])
def test_gguf_of_another_tool(layer_count: int | None, tmp_path: Path) -> None:
    written = rows(*range(1, N_LAYERS))
    foreign(tmp_path / "happy.gguf", written, layer_count)
    loaded = Direction.load(tmp_path / "happy.gguf")
    assert loaded.name == "happy"
    assert loaded.method == "imported"
    assert loaded.metadata == {"model_hint": "llama"}
    assert loaded.n_layers == N_LAYERS
    assert loaded.scale[0] == 0
    torch.testing.assert_close(loaded.scale[1:], torch.full((N_LAYERS - 1,), 3.0))
    for block in range(1, N_LAYERS):
        row = torch.from_numpy(written[f"direction.{block}"])
        torch.testing.assert_close(loaded.vectors[block] * loaded.scale[block], row)


def test_gguf_that_stops_early_needs_the_number_of_blocks(tmp_path: Path) -> None:
    foreign(tmp_path / "d.gguf", rows(2, 4), layer_count=2)
    assert Direction.load(tmp_path / "d.gguf").n_layers == 5
    (loaded,) = formats.load(tmp_path / "d.gguf", n_layers=32)
    assert loaded.n_layers == 32
    assert loaded.layers == [2, 4]
    with pytest.raises(ValueError, match=r"direction\.4, for block 4; a model of 4 blocks"):
        formats.load(tmp_path / "d.gguf", n_layers=4)
    foreign(tmp_path / "more.gguf", rows(2, 4), layer_count=9)  # the number of blocks, which is more than the file has
    found = Direction.load(tmp_path / "more.gguf")
    assert (found.n_layers, found.layers) == (9, [2, 4])


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_the_number_of_blocks_is_checked_where_the_file_knows_it(suffix: str, tmp_path: Path) -> None:
    described()[1:].save(tmp_path / f"d{suffix}")
    assert len(formats.load(tmp_path / f"d{suffix}", n_layers=N_LAYERS)) == 1
    with pytest.raises(ValueError, match="'honesty' has 6 blocks, not 7"):
        formats.load(tmp_path / f"d{suffix}", n_layers=7)


def test_direction_0_is_refused_both_ways(tmp_path: Path) -> None:
    foreign(tmp_path / "d.gguf", rows(0, 1, 2))
    with pytest.raises(ValueError, match=r"'direction\.0' has no place"):
        Direction.load(tmp_path / "d.gguf")
    with pytest.raises(ValueError, match=r"after block 0.*direction\[1:\]"):
        direction().save(tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("tensors", "extra", "message"),
    [
        (rows(1) | {"blk.0.weight": np.zeros(4, np.float32)}, {}, r"'blk\.0\.weight' is not direction\.N"),
        ({"direction.x": np.zeros(4, np.float32)}, {}, r"'direction\.x' is not direction\.N"),
        ({"direction.1": np.zeros(4, np.float16)}, {}, r"'direction\.1' is F16; F32 is needed"),
        ({"direction.1": np.zeros((2, 4), np.float32)}, {}, r"'direction\.1' has shape \[2, 4\]; one dimension"),
        (rows(1) | rows(2, width=8), {}, r"'direction\.2' has 8 elements, the one before has 16"),
        ({"direction.1": np.full(4, np.nan, np.float32)}, {}, r"'direction\.1' holds NaN"),
        ({"direction.1": np.full(4, np.inf, np.float32)}, {}, r"'direction\.1' holds NaN or infinity"),
        (rows(1) | {"direction.01": np.ones(HIDDEN, np.float32)}, {}, r"block 1 has two tensors"),
        ({}, {}, "without a single direction"),
        (rows(1), {"architecture": "llama"}, "architecture 'llama'"),
    ],
)
def test_gguf_bad_content_is_named(tensors: dict, extra: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    foreign(path, tensors, **extra)
    with pytest.raises(ValueError, match=message) as caught:
        Direction.load(path)
    assert str(path) in str(caught.value)


def test_gguf_changed_by_another_tool_is_noticed(tmp_path: Path) -> None:
    saved = described()[1:]
    saved.save(tmp_path / "d.gguf")
    content = bytearray((tmp_path / "d.gguf").read_bytes())
    row = saved.vectors[3].numpy().tobytes()
    at = content.index(row)
    content[at : at + len(row)] = (2 * saved.vectors[3]).numpy().tobytes()
    (tmp_path / "d.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"'direction\.3' has length 2, but icon2_rt\.scale says 1"):
        Direction.load(tmp_path / "d.gguf")


def test_gguf_holds_one_direction(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds one direction, not \['a', 'b'\]"):
        DirectionSet([direction("a")[1:], direction("b", 1)[1:]]).save(tmp_path / "d.gguf")
    with pytest.raises(ValueError, match="scale 0 at every block"):
        direction(scale=[0.0] * N_LAYERS).save(tmp_path / "d.gguf")


# --- bad input -------------------------------------------------------------------------------------------------------


def bad_safetensors(path: Path, change: str) -> None:
    """A file that is right but for one thing."""
    described().save(path)
    with safe_open(path, framework="pt") as file:
        text = file.metadata()["icon2_rt"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = json.loads(text)
    (entry,) = content["directions"]
    vectors, scale = "honesty.vectors", "honesty.scale"
    match change:
        case "nan":
            tensors[vectors][2, 3] = torch.nan
        case "infinite scale":
            tensors[scale][1] = torch.inf
        case "dtype":
            tensors[vectors] = tensors[vectors].double()
        case "fewer blocks":
            tensors[vectors] = tensors[vectors][:-1].contiguous()
        case "scale size":
            tensors[scale] = tensors[scale][:-1].contiguous()
        case "missing tensor":
            del tensors[scale]
        case "unknown tensor":
            tensors["other"] = torch.zeros(3)
        case "no vector behind the scale":
            tensors[vectors][4] = 0
        case "layer convention":
            content["layers"] = "hidden_states[i]"
        case "version":
            content["version"] = 99
        case "no name":
            entry["name"] = ""
        case "health":
            entry["health"] = {"contrast": "high"}
        case "metadata":
            entry["metadata"] = {"n": 3}
        case "no size":
            del entry["n_layers"]
        case "twice":
            content["directions"] *= 2
        case "none":
            content["directions"] = []
    text = "{" if change == "not json" else json.dumps(content)
    safetensors.torch.save_file(tensors, path, metadata=None if change == "foreign" else {"icon2_rt": text})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", r"tensor 'honesty\.vectors' holds NaN"),
        ("infinite scale", r"tensor 'honesty\.scale' holds NaN or infinity"),
        ("dtype", r"'honesty\.vectors' is torch\.float64; torch\.float32 is needed"),
        ("fewer blocks", r"'honesty\.vectors' has shape \[5, 16\]; its description says \[6, 16\]"),
        ("scale size", r"'honesty\.scale' has shape \[5\]"),
        ("missing tensor", r"missing \['honesty\.scale'\]"),
        ("unknown tensor", r"not described \['other'\]"),
        ("no vector behind the scale", r"zero at block\(s\) \[4\]"),
        ("layer convention", r"layer convention is 'hidden_states\[i\]'"),
        ("version", "description version 99"),
        ("no name", "has the name ''"),
        ("health", "'honesty' has health figures that are not lists"),
        ("metadata", "'honesty' has metadata that is not text"),
        ("no size", "'honesty' has n_layers None"),
        ("twice", "names a direction twice"),
        ("none", "names no direction"),
        ("not json", "cannot be read"),
        ("foreign", r"holds no directions.*'icon2_rt'"),
    ],
)
def test_safetensors_bad_content_is_named(change: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    bad_safetensors(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        DirectionSet.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_a_truncated_file_is_named(suffix: str, tmp_path: Path) -> None:
    described()[1:].save(tmp_path / f"whole{suffix}")
    content = (tmp_path / f"whole{suffix}").read_bytes()
    path = tmp_path / f"cut{suffix}"
    for length in [*range(64), *range(64, len(content) - 1, 37), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"cut{suffix}"):
            formats.load(path)


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_a_corrupt_file_is_read_or_named_never_anything_else(suffix: str, tmp_path: Path) -> None:
    """One bit changed anywhere before the numbers: that may be harmless (a letter of a note), but not hang or crash."""
    described()[1:].save(tmp_path / f"whole{suffix}")
    content = (tmp_path / f"whole{suffix}").read_bytes()
    header = len(content) - (N_LAYERS - 1) * HIDDEN * 4
    path = tmp_path / f"corrupt{suffix}"
    generator = random.Random(0)
    refused = []
    for _ in range(600):
        changed = bytearray(content)
        changed[generator.randrange(header)] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        try:
            formats.load(path)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert [message for message in refused if f"corrupt{suffix}" not in message] == []


@pytest.mark.timeout(30)
@pytest.mark.parametrize("method", ["a", "aa", "aaa", "aaaa"])  # one of them aligns the array with the file's end
def test_gguf_absurd_length_is_refused_at_the_end_of_the_file(method: str, tmp_path: Path) -> None:
    """The library's reader takes what lies past an aligned end as empty, and would do so 2^40 times."""
    path = tmp_path / "d.gguf"
    direction(method=method)[1:].save(path)
    content = bytearray(path.read_bytes())
    length_at = content.index(b"icon2_rt.scale") + len("icon2_rt.scale") + 8  # after the type and the item type
    assert int.from_bytes(content[length_at : length_at + 8], "little") == N_LAYERS
    content[length_at : length_at + 8] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a whole GGUF file: .* wanted at byte"):
        formats.load(path)


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_a_pickle_is_not_opened(suffix: str, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "sprung", "x"))

    path = tmp_path / f"d{suffix}"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is not a whole"):
        formats.load(path)
    torch.save({"v": Trap()}, path)
    with pytest.raises(ValueError, match="is not a whole"):
        formats.load(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["d.pt", "d.pkl", "d", "d.npz"])
def test_unknown_suffix_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.safetensors, \.gguf"):
        direction().save(tmp_path / name)
    with pytest.raises(ValueError, match=r"\.safetensors, \.gguf"):
        Direction.load(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_what_is_not_there_or_not_a_file(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        formats.load(tmp_path / f"missing{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        formats.load(tmp_path / f"folder{suffix}")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to save"):
        DirectionSet([]).save(tmp_path / "d.safetensors")
    with pytest.raises(TypeError, match="not dict"):
        formats.save({}, tmp_path / "d.safetensors")
    with pytest.raises(TypeError, match="metadata is text, not 'n': 3"):
        direction(metadata={"n": 3}).save(tmp_path / "d.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- writing ---------------------------------------------------------------------------------------------------------


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_no_room_leaves_the_old_file(suffix: str, tmp_path: Path) -> None:
    """A real write that the system cuts short: the process may not make a file longer than 2 kB."""
    described()[1:].save(tmp_path / f"d{suffix}")
    old = (tmp_path / f"d{suffix}").read_bytes()
    code = f"""
        import resource, signal, torch
        from icon2_rt.steering import Direction
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
        try:
            Direction("big", torch.randn(40, 64))[1:].save("d{suffix}")
        except OSError as error:
            print(error)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)
    assert f"cannot write d{suffix}: File too large. What was there before is unchanged" in out.stdout, out.stderr
    assert (tmp_path / f"d{suffix}").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [f"d{suffix}"]


def test_a_folder_without_the_right_to_write(tmp_path: Path) -> None:
    """In a process of an ordinary user: for root no folder is read-only."""
    described().save(tmp_path / "d.safetensors")
    old = (tmp_path / "d.safetensors").read_bytes()
    code = """
        import os, torch
        from icon2_rt import formats
        from icon2_rt.formats import safetensors
        from icon2_rt.steering import Direction
        os.chmod(".", 0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            Direction("new", torch.randn(4, 8)).save("d.safetensors")
        except PermissionError as error:
            print(error)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)
    os.chmod(tmp_path, 0o755)
    assert "cannot write d.safetensors: Permission denied" in out.stdout, out.stderr
    assert (tmp_path / "d.safetensors").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_a_missing_folder_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot write .*: No such file or directory"):
        direction().save(tmp_path / "nowhere" / "d.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    direction().save(tmp_path / "d.safetensors")
    (tmp_path / "other").touch()
    assert stat.S_IMODE((tmp_path / "d.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "other").stat().st_mode
    )
