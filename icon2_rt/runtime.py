"""Runtime: the face of the engine. It checks what it is given, turns prompts into requests and rows into outputs."""

from __future__ import annotations

import copy
import difflib
import inspect
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from icon2_rt import models
from icon2_rt.chat_template import ChatTemplate
from icon2_rt.engine import (
    Branch,
    Engine,
    EngineOptions,
    Model,
    PinnedPrefix,
    Reading,
    Record,
    Request,
    Row,
    Sampling,
    resolve_sampling,
)
from icon2_rt.engine.engine import first_steered
from icon2_rt.engine.forward import computing
from icon2_rt.engine.kv import default_prefill_chunk, plan_pages
from icon2_rt.engine.sampling import SUPPORTED, generable
from icon2_rt.engine.turns import Stream
from icon2_rt.extraction import ContrastStatistics, PairStates, PromptStates, SideStatistics
from icon2_rt.ops import row_seeds, select
from icon2_rt.outputs import (
    BranchedOutput,
    Completion,
    LastRun,
    Message,
    OutputList,
    PairedOutput,
    Prompt,
    Scored,
)
from icon2_rt.prompts import Encoder, check_is_list, is_chat, named
from icon2_rt.qualify import Qualification, Subject, choose
from icon2_rt.steering import CompiledSteering, Direction, DirectionSet, Steering, compile_steering
from icon2_rt.usage import Usage

Steerings = Steering | None | Sequence[Steering | None]
Noise = Literal["independent", "common"]
Method = TypeVar("Method", bound=Callable[..., Any])
TemplateVariables = Mapping[str, Any] | None
Positions = int | Sequence[int] | Sequence[Sequence[int]]


class GenerateOptions(TypedDict, total=False):
    """Options of every ``generate*`` and ``stream*`` method, with what holds where one is left out.

    The call:
        n: samples of every prompt (1). All of them share the prompt's KV, and each has random numbers of its own. The
            result has n outputs per prompt, one after the other: ``output.index`` is the prompt's place and
            ``output.sample`` the sample's number. Sample 0 is what n=1 gives.
        prefix: of :meth:`Runtime.prefix`, which every prompt continues (none).
        seed: one for the call (a random one), or a list of row seeds, one per prompt, sample and branch in the order of
            the result.
        noise: "common" gives the branches of a sample the same random numbers ("independent").
        sample_ids: one per prompt, in place of its index, in the derivation of row seeds (the index).
        generation_config: the base of the sampling options; what it leaves out is the model's own (none).
        chat_template_kwargs: variables of the chat template, such as ``{"enable_thinking": False}`` (none).
        progress: show a progress bar (False).

    Sampling, by transformers' names. An option given here wins over ``generation_config``, and that over the model's
    own generation config; the values in brackets hold where none of them has one:
        max_new_tokens: the most tokens of a response (256, or fewer where the model has no room; transformers has 20).
        max_length: the same, the prompt counted too (none).
        min_new_tokens, min_length: so many tokens before the eos may come (0).
        do_sample: draw, or take the likeliest token (False). Giving temperature, top_k, top_p or min_p as an option
            turns it on by itself.
        temperature (1.0), top_k (50), top_p (1.0), min_p (0.0): used when drawing.
        repetition_penalty: counts the prompt's tokens too (1.0).
        eos_token_id: one or a list (the tokenizer's).
        stop_strings: texts that end a response; a special token's text is found too (none).
    """

    n: int
    prefix: Prefix | None
    seed: int | Sequence[int] | None
    noise: Noise
    sample_ids: Sequence[int] | None
    generation_config: GenerationConfig | None
    chat_template_kwargs: TemplateVariables
    progress: bool
    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | None


_DEFAULTS: Mapping[str, Any] = {"n": 1, "noise": "independent", "progress": False}  # None for the others
_CALL_OPTIONS = tuple(name for name in GenerateOptions.__annotations__ if name not in SUPPORTED)


def _with_options(method: Method) -> Method:
    """Show the options by name in ``help`` and to what completes from a signature, as notebooks do."""
    signature = inspect.signature(method)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_DEFAULTS.get(name),
            annotation=getattr(annotation, "__forward_arg__", annotation),
        )
        for name, annotation in inspect.get_annotations(GenerateOptions).items()
    ]
    method.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return method


class Runtime:
    """A model that decodes steered branches, several of one prompt in a single pass over one prompt KV.

    Any thread may call it. Calls of several threads wait for each other: one that returns when it is done
    (``generate``, ``score`` …) for a whole call, a stream for its next output only. Runtimes on one CUDA device wait
    for each other too; on a CPU each works for itself (unless Triton interprets its kernels there).

    Args:
        model: a loaded transformers model of a supported family. Its weights are taken over block by block and the
            original is left empty, unless ``keep_model`` (twice the memory).
        tokenizer: its tokenizer; without one, prompts are token ids and completions have no text.
        device: ``"auto"`` (CUDA where there is one), or a torch device.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``. ``"auto"`` is on CUDA what the device has
            proven: the first model of some sizes tries the kernels there, once, in a process of its own (docs/gpu.md).
        kv_memory: bytes (or ``"8GiB"``) for KV pages; None: half of the free RAM, or what a GPU has free beside the
            weights and all that a call needs (:class:`icon2_rt.engine.kv.Reserve`).
        max_rows: rows decoded together; further ones wait. page_size: tokens a KV page.
        split_pages: pages an attention split (positions that are read together). prefill_chunk: tokens a prefill pass;
            None: 2048, or 512 on a GPU of less than 16 GB.
        cuda_graphs: replay a decode step as one graph where the device and the backend can.
        max_directions, max_terms: the direction bank's slots, and the most terms of one steering.

    Attributes:
        qualification: what the device has proven, which ``backend="auto"`` follows on CUDA; None on a CPU, and where a
            backend was asked for by name.

    Raises:
        ValueError: an unsupported architecture, quantised weights, a backend that cannot run here, a bad size.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: str | torch.device = "auto",
        backend: str = "auto",
        keep_model: bool = False,
        kv_memory: int | str | None = None,
        max_rows: int = 64,
        max_directions: int = 64,
        max_terms: int = 8,
        page_size: int = 32,
        split_pages: int = 4,
        prefill_chunk: int | None = None,
        cuda_graphs: bool = True,
    ):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"model must be a loaded transformers model, not {type(model).__name__}; "
                f"for a path or hub id use Runtime.from_pretrained({model!r})"
            )
        options = EngineOptions(
            kv_memory=kv_memory, page_size=page_size, split_pages=split_pages, max_rows=max_rows,
            max_directions=max_directions, max_terms=max_terms, cuda_graphs=cuda_graphs,
            **({} if prefill_chunk is None else {"prefill_chunk": prefill_chunk}),
        )  # fmt: skip
        family = models.family_of(model)
        where = _device(device)
        self.spec = models.read_spec(model, family)
        dtype = next(model.parameters()).dtype
        # Before anything else touches the device: a trial needs it, and its memory, for itself.
        chosen = choose(backend, where, Subject(self.spec, str(dtype)[6:], page_size, split_pages, max_terms))
        options = replace(options, cuda_graphs=cuda_graphs and chosen.graphs)
        self.qualification: Qualification | None = chosen.qualification
        self.fingerprint = models.fingerprint(model, self.spec)
        self.name = str(model.config._name_or_path or type(model).__name__)
        self.tokenizer = tokenizer
        self.generation_config = copy.deepcopy(model.generation_config)
        self._default_eos = self._ending_tokens(tokenizer)
        if prefill_chunk is None:
            options = replace(options, prefill_chunk=default_prefill_chunk(where))
        self.options = options
        if kv_memory is not None:  # refused while the model is still whole
            plan_pages(self.spec, page_size, dtype, where, kv_memory)
        weights = models.take_weights(model, family, where, keep_model)
        self._engine = Engine(Model(self.spec, weights, chosen.ops), options)
        self._turns = self._engine.turns
        self._encoder = Encoder(tokenizer, self.spec.vocab_size, self.spec.max_length)
        self._warned: set[str] = set()
        self.usage = Usage()
        self._last_run: LastRun | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        backend: str = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> Runtime:
        """Load a checkpoint (a folder or a hub id).

        Args:
            kwargs: the runtime's own options (``kv_memory=``, ``max_rows=`` …); all others go to transformers'
                ``from_pretrained`` (``dtype=``, ``revision=`` …). The default dtype is the checkpoint's.

        Raises:
            ValueError: an unsupported architecture (the message lists the supported ones), an adapter, a GGUF file,
                quantised weights, weights that are missing or that the model has no place for. OSError: not found.
            TypeError: an option that neither the runtime nor transformers has.
        """
        path = os.path.expanduser(path) if isinstance(path, str) else Path(path).expanduser()
        own = {k: kwargs.pop(k) for k in list(kwargs) if k in _RUNTIME_OPTIONS}
        shared = {k: kwargs[k] for k in models.WHICH_FILES if k in kwargs}
        # Before gigabytes are read, as all that follows.
        config = models.read_config(path, **kwargs)
        models.find_family(models.architecture_of(config))
        for name in kwargs:
            close = difflib.get_close_matches(name, (*_RUNTIME_OPTIONS, "device", "backend", "tokenizer"), 1, 0.8)
            if close and not hasattr(config, name):
                raise TypeError(f"unknown option {name!r}: did you mean {close[0]!r}?")
        EngineOptions(**{k: v for k, v in own.items() if k != "keep_model" and v is not None})
        select(backend, _device(device))
        if tokenizer is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(path, **shared)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"no tokenizer could be loaded from {str(path)!r}: pass tokenizer=..., or load the model with "
                    f"transformers and use Runtime(model), whose prompts are token ids. ({error})"
                ) from error
        model = models.load_model(path, **kwargs)
        return cls(model, tokenizer, device=device, backend=backend, **own)

    def _ending_tokens(self, tokenizer: PreTrainedTokenizerBase | None) -> Any:
        """The tokenizer's eos; from it and from the model's own generation config what the model cannot generate is
        left out, with a warning: transformers would wait for it in vain."""
        config, vocab = self.generation_config, self.spec.vocab_size
        default, strange = generable(getattr(tokenizer, "eos_token_id", None), vocab)
        if config is not None:
            config.eos_token_id, more = generable(config.eos_token_id, vocab)
            strange = more + strange
        if strange:
            left = config.eos_token_id if config is not None and config.eos_token_id is not None else default
            warnings.warn(
                f"eos_token_id {', '.join(map(str, strange))} of {self.name} is outside the vocabulary (0 to "
                f"{vocab - 1}) "
                f"and ends nothing; responses end with {'no token' if left is None else left}",
                stacklevel=3,
            )
        return default

    # ---------------------------------------------------------------- facts

    @property
    def device(self) -> torch.device:
        return self._engine.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._engine.model.dtype

    @property
    def backend(self) -> str:
        return self._engine.model.ops.backend

    @property
    def kv_pages(self) -> int:
        """Pages of KV memory in all; :attr:`free_kv_pages` of them are free now."""
        return self._engine.kv.n_pages

    @property
    def free_kv_pages(self) -> int:
        return self._engine.kv.free_pages

    @property
    def page_size(self) -> int:
        return self._engine.kv.page_size

    @property
    def last_run(self) -> LastRun | None:
        """What the latest call did: how much each term of its steerings acted, and which code ran. None before any.

        A call is recorded at its end: when it returns or raises after work began, or when its stream is exhausted or
        closed. Of calls that nest (one is made while a stream is open) the latest is the one that ended last. A stream
        that nothing was taken from, a call that was refused, and ``prefix`` leave no record. Where several threads use
        a runtime, the latest call may be another thread's.
        """
        return self._last_run

    @property
    def template(self) -> ChatTemplate:
        """How chats are rendered: the tokenizer's chat template, with variables and a clock that hold for all calls."""
        return self._encoder.template

    @template.setter
    def template(self, template: ChatTemplate) -> None:
        self._encoder.template = template

    def encode(self, prompt: Prompt, *, chat_template_kwargs: TemplateVariables = None) -> list[int]:
        """The token ids of one prompt, exactly as ``generate`` uses them."""
        return self._encoder.encode(prompt, template=self._encoder.template_for(chat_template_kwargs))

    def decode(self, token_ids: Sequence[int], prompt: Prompt = ()) -> str:
        """The text of ``token_ids`` where they follow ``prompt``, without special tokens: ``Completion.text``."""
        before = self._encoder.encode(prompt) if len(prompt) else []
        return self._encoder.decode_behind(before, token_ids)

    def encode_completion(self, text: str, prompt_ids: Sequence[int]) -> list[int]:
        """The token ids of a text that follows ``prompt_ids``, as :meth:`score` reads a completion."""
        return self._encoder.completion(text, prompt_ids)

    def message(self, chat: Sequence[Message], token_ids: Sequence[int]) -> str:
        """The content of the assistant's message that ``token_ids`` make as the answer to ``chat``."""
        return self._encoder.message(chat, self._encoder.encode(chat), token_ids)

    def __repr__(self) -> str:
        s = self.spec
        return (
            f"Runtime({self.name!r}, {s.family}, {s.n_layers} blocks × {s.hidden_size}, {str(self.dtype)[6:]} on "
            f"{self.device}, backend {self.backend}, {self.kv_pages} KV pages of {self.page_size}"
            + (f", {self.qualification})" if self.qualification is not None else ")")
        )

    # ---------------------------------------------------------------- generating

    @_with_options
    def generate(
        self, prompts: Sequence[Prompt], steering: Steerings = None, **options: Unpack[GenerateOptions]
    ) -> OutputList[Completion]:
        """One completion per prompt, in order; with ``n=``, the n samples of each prompt one after the other.

        Args:
            prompts: a list of texts, chats (lists of messages) or lists of token ids.
            steering: one for all prompts, or a list with one per prompt; None = unsteered.
            options: see :class:`GenerateOptions`; ``max_new_tokens`` is 256 where neither it nor the model says, and
                giving ``temperature`` turns sampling on.
        """
        with self._turns:
            outputs = _in_order(self._stream(prompts, {"steering": steering}, **options))
        return OutputList(output.branches[0] for output in outputs)

    @_with_options
    def generate_branches(
        self, prompts: Sequence[Prompt], branches: Sequence[Steerings], **options: Unpack[GenerateOptions]
    ) -> OutputList[BranchedOutput]:
        """K continuations of every prompt, decoded in lock-step over one copy of the prompt's KV.

        Args:
            prompts: a list of texts, chats (lists of messages) or lists of token ids. A chat that ends with a message
                of the assistant is continued there.
            branches: K entries, each a steering for all prompts (None = unsteered) or a list with one per prompt.
            options: see :class:`GenerateOptions`.

        Raises:
            TypeError, ValueError: before any work; the message names the argument and what would be right.
        """
        with self._turns:
            return _in_order(self.stream_branches(prompts, branches, **options))

    @_with_options
    def stream_branches(
        self, prompts: Sequence[Prompt], branches: Sequence[Steerings], **options: Unpack[GenerateOptions]
    ) -> Iterator[BranchedOutput]:
        """:meth:`generate_branches`, each prompt as soon as its branches are done; ``output.index`` is its place.

        Arguments are checked at the call, not at the first output.
        """
        if isinstance(branches, Steering | Direction | str) or not isinstance(branches, Sequence) or not branches:
            raise TypeError(
                "branches is a non-empty list: one steering (or None, or a list with one per prompt) per branch"
            )
        named_branches = {f"branches[{k}]": branch for k, branch in enumerate(branches)}
        return self._stream(prompts, named_branches, **options)

    @_with_options
    def generate_pairs(
        self,
        prompts: Sequence[Prompt],
        *,
        positive: Steerings,
        negative: Steerings,
        **options: Unpack[GenerateOptions],
    ) -> OutputList[PairedOutput]:
        """A positive and a negative branch of every prompt, in one pass over one copy of the prompt's KV.

        Args:
            prompts: a list of texts, chats (lists of messages) or lists of token ids.
            positive, negative: the steering of each side, one for all prompts or a list with one per prompt; None =
                unsteered.
            options: see :class:`GenerateOptions`.

        Raises:
            TypeError, ValueError: before any work; the message names the argument and what would be right.
        """
        with self._turns:
            pairs = self.stream_pairs(prompts, positive=positive, negative=negative, **options)
            return OutputList(sorted(pairs, key=lambda pair: pair.index))

    @_with_options
    def stream_pairs(
        self,
        prompts: Sequence[Prompt],
        *,
        positive: Steerings,
        negative: Steerings,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[PairedOutput]:
        """:meth:`generate_pairs`, each pair as soon as both branches are done; ``pair.index`` is its prompt's place.

        Arguments are checked at the call, not at the first pair.
        """
        outputs = self._stream(prompts, {"positive": positive, "negative": negative}, **options)
        variables = options.get("chat_template_kwargs")
        pairs = (PairedOutput(o.index, o.prompt, o.branches[0], o.branches[1], variables, o.sample) for o in outputs)
        return Stream(self._turns, pairs)

    def _stream(
        self,
        prompts: Sequence[Prompt],
        branches: Mapping[str, Steerings],
        *,
        n: int = 1,
        prefix: Prefix | None = None,
        seed: int | Sequence[int] | None = None,
        noise: Noise = "independent",
        sample_ids: Sequence[int] | None = None,
        generation_config: GenerationConfig | None = None,
        chat_template_kwargs: TemplateVariables = None,
        progress: bool = False,
        **sampling: Any,
    ) -> Iterator[BranchedOutput]:
        """Check everything, then return the iterator that does the work. ``branches`` by the argument that each is."""
        options = resolve_sampling(
            generation_config,
            sampling,
            model=self.generation_config,
            vocab_size=self.spec.vocab_size,
            default_eos=self._default_eos,
            arguments=("prompts", *dict.fromkeys(name.partition("[")[0] for name in branches), *_CALL_OPTIONS),
        )
        if options.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings needs a tokenizer, and this runtime was made without one")
        pinned = self._pinned(prefix)
        template = self._encoder.template_for(chat_template_kwargs)
        tokens = self._tokens(prompts, prefix, chat_template_kwargs)
        steerings = self._steerings(branches, len(tokens))
        budgets = [self._budget(i, len(t), options, "max_new_tokens" in sampling) for i, t in enumerate(tokens)]
        n = _plain(n)
        _check_samples(n, options)
        seeds = iter(self._seeds(len(tokens), n, len(steerings), seed, noise, sample_ids, options))
        requests = [
            Request(
                index=i,
                tokens=tuple(ids),
                branches=tuple(Branch(row[i], next(seeds)) for _ in range(n) for row in steerings),
                sampling=options,
                budget=budgets[i],
                prefix=pinned,
            )
            for i, ids in enumerate(tokens)
        ]
        names = list(branches)
        _check_scopes(requests, names)
        with self._turns:
            self._engine.check(requests)
        # A copy: the caller may change the list meanwhile.
        return Stream(self._turns, self._run(list(prompts), requests, names, template, progress))

    def _tokens(
        self, prompts: Sequence[Prompt], prefix: Prefix | None, variables: TemplateVariables
    ) -> list[list[int]]:
        if prefix is None:
            return self._encoder.encode_all(prompts, variables=variables)
        return prefix.join_all(prompts, variables)

    def _pinned(self, prefix: Prefix | None) -> PinnedPrefix | None:
        if prefix is None:
            return None
        if not isinstance(prefix, Prefix):
            raise TypeError(f"prefix is what `with rt.prefix(...) as prefix:` gives, not {type(prefix).__name__}")
        if prefix._runtime is not self:
            raise ValueError("this prefix was made by another runtime: its KV belongs to that model's memory")
        return prefix.pinned

    @contextmanager
    def _recording(self, call: str, asked: int, branches: Sequence[str] = ()) -> Iterator[Record]:
        """Keep the record of what is done inside as :attr:`last_run`; arguments: see :class:`Record`."""
        record = Record(branches, asked)
        try:
            yield record
        finally:
            self._last_run = record.close(call, self._engine.model)
            self.usage.ran(self._last_run)

    def _run(
        self,
        prompts: Sequence[Prompt],
        requests: list[Request],
        branches: Sequence[str],
        template: ChatTemplate,
        progress: bool,
    ) -> Generator[BranchedOutput]:
        stop_strings = requests[0].sampling.stop_strings if requests else ()  # of the call: the same for all
        decode = self._encoder.decode_for(stop_strings) if stop_strings else None
        with (
            self._recording("generate", sum(len(r.branches) for r in requests), branches) as record,
            closing(self._engine.decode(requests, decode, record)) as decoded,  # what was running is counted
            tqdm(total=len(requests), unit="prompt", disable=not progress) as bar,
        ):
            for request, rows in decoded:
                bar.update()
                pinned = len(request.prefix.tokens) if request.prefix is not None else 0
                self.usage.generated(len(request.tokens), pinned, [len(row.tokens) for row in rows])
                prompt = prompts[request.index]
                self._tell_errors(request, rows, len(branches))
                completions = [self._completion(row, prompt, template) for row in rows]
                for sample, begin in enumerate(range(0, len(rows), len(branches))):
                    one = completions[begin : begin + len(branches)]
                    yield BranchedOutput(request.index, prompt, one, sample)

    def _tell_errors(self, request: Request, rows: Sequence[Row], n_branches: int) -> None:
        bad = next((row for row in rows if row.finish == "error"), None)
        if bad is not None:
            sample, branch = divmod(bad.branch, n_branches)
            of_sample = f"sample {sample}, " if len(rows) > n_branches else ""
            warnings.warn(
                f"prompts[{request.index}], {of_sample}branch {branch}: the logits of token {len(bad.tokens)} are not "
                f"finite: the steering is too strong for {self.dtype}, or a weight is bad. This branch ends there, "
                f"with finish_reason='error'",
                RuntimeWarning,
                stacklevel=4,
            )

    def _completion(self, row: Row, prompt: Prompt, template: ChatTemplate) -> Completion:
        if row.finish is None:
            raise RuntimeError("a row was handed out before it was finished")
        text, message, before = None, None, row.request.tokens
        if self.tokenizer is not None:
            text = self._encoder.decode_behind(before, row.tokens)
            if is_chat(prompt):
                message = self._encoder.message(prompt, before, row.tokens, template)  # type: ignore[arg-type]
        return Completion(text, row.tokens, row.logprobs, row.finish, row.seed, message if message != text else None)

    def _budget(self, n: int, n_prompt: int, options: Sampling, asked: bool) -> int:
        room = self.spec.max_length
        budget = options.budget(n_prompt, room)
        if not asked:  # a default or the model's own config: what fits
            budget = min(budget, room - n_prompt)
        if budget < 1 or n_prompt >= room:
            raise ValueError(
                f"prompts[{n}]: {n_prompt} tokens leave no room to generate (the model has {room} positions"
                + (f", max_length={options.max_length})" if options.max_length else ")")
            )
        if n_prompt + budget > room:
            raise ValueError(
                f"prompts[{n}]: {n_prompt} prompt + {budget} new tokens are more than the model's {room} positions"
                + (f" (sliding window {self.spec.sliding_window})" if room == self.spec.sliding_window else "")
                + f"; max_new_tokens can be at most {room - n_prompt}"
            )
        return budget

    def _seeds(
        self,
        n_prompts: int,
        n_samples: int,
        n_branches: int,
        seed: int | Sequence[int] | None,
        noise: Noise,
        sample_ids: Sequence[int] | None,
        options: Sampling,
    ) -> list[int | None]:
        """One row seed per prompt, sample and branch, prompt by prompt; None for greedy rows."""
        if noise not in ("independent", "common"):
            raise ValueError(f"noise must be 'independent' or 'common', not {noise!r}")
        seed, sample_ids = _plain(seed), _plain(sample_ids)
        if sample_ids is not None and not (isinstance(sample_ids, Sequence) and all(map(_is_int, sample_ids))):
            raise TypeError(f"sample_ids is a list of whole numbers, one per prompt, not {sample_ids!r}")
        if sample_ids is not None and len(sample_ids) != n_prompts:
            raise ValueError(f"sample_ids has {len(sample_ids)} entries for {n_prompts} prompts: one per prompt")
        if isinstance(seed, bool) or not (seed is None or isinstance(seed, int | Sequence)):
            raise TypeError(f"seed is a whole number or a list of them, not {seed!r}")
        if isinstance(seed, Sequence):
            n_rows = n_prompts * n_samples * n_branches
            if len(seed) != n_rows:
                samples = f" × {n_samples} samples" if n_samples > 1 else ""
                raise ValueError(
                    f"a list of seeds has one per row: {n_prompts} prompts{samples} × {n_branches} branches = "
                    f"{n_rows}, not {len(seed)}"
                )
            for s in seed:
                if not _is_int(s) or not 0 <= s < 2**64:
                    raise ValueError(f"a seed must be a whole number in [0, 2**64), not {s!r}")
            rows = list(seed)
        elif not n_prompts:
            rows = []
        else:
            base = int.from_bytes(os.urandom(8), "little") if seed is None else seed
            ids = list(range(n_prompts)) if sample_ids is None else list(sample_ids)
            counts = (range(n_samples), range(n_branches))
            places = [(i, None if noise == "common" else k, s) for i in ids for s, k in product(*counts)]
            rows = row_seeds(base, [i for i, _, _ in places], [k for _, k, _ in places], [s for *_, s in places])
        return list(rows) if options.do_sample else [None] * len(rows)

    def _steerings(self, branches: Mapping[str, Steerings], n_prompts: int) -> list[list[CompiledSteering | None]]:
        """Per branch, the compiled steering of every prompt."""
        compiled: dict[int, CompiledSteering | None] = {}

        def compile_one(steering: Steering | None, where: str) -> CompiledSteering | None:
            if id(steering) not in compiled:
                try:
                    compiled[id(steering)] = compile_steering(steering, self.spec.n_layers, self.spec.hidden_size)
                except (TypeError, ValueError) as error:
                    raise named(error, where) from None
                for term in steering.terms if steering is not None else ():
                    self.check_model(term.direction)
            return compiled[id(steering)]

        out = []
        for name, branch in branches.items():
            per_prompt = (
                branch if isinstance(branch, Sequence) and not isinstance(branch, str) else [branch] * n_prompts
            )
            if len(per_prompt) != n_prompts:
                raise ValueError(
                    f"{name}: {len(per_prompt)} steerings for {n_prompts} prompts: one for all, or one for each"
                )
            out.append([compile_one(s, name) for s in per_prompt])
        return out

    def check_model(self, direction: Direction) -> None:
        """Warn, once per direction, if it was made on another model."""
        if direction.model is not None and direction.model != self.fingerprint and direction.name not in self._warned:
            self._warned.add(direction.name)
            if not models.comparable(direction.model):
                warnings.warn(
                    f"direction {direction.name!r} carries a fingerprint of an older kind ({direction.model}, model "
                    f"{direction.model_name or 'not named'}), which did not look at all weights: whether it was made "
                    f"on this model ({self.name}) cannot be told",
                    stacklevel=2,
                )
                return
            warnings.warn(
                f"direction {direction.name!r} was made on another model ({direction.model_name or direction.model}, "
                f"fingerprint {direction.model}); this one is {self.name} ({self.fingerprint}). "
                f"The sizes fit, the meaning may not.",
                stacklevel=2,
            )

    # ---------------------------------------------------------------- prefixes

    def prefix(self, tokens_or_messages: Prompt, *, chat_template_kwargs: TemplateVariables = None) -> Prefix:
        """Prefill a common beginning once and hold its KV, for any number of prompts that continue it.

        Args:
            tokens_or_messages: ids or text that prompts are appended to, or messages (a system prompt, say) that chats
                are appended to.
            chat_template_kwargs: variables of the chat template, for the prefix and the chats that continue it.

        Use as a context manager; its pages are given back at the end::

            with rt.prefix([{"role": "system", "content": "..."}]) as prefix:
                rt.generate(prompts, prefix=prefix)
        """
        return Prefix(self, tokens_or_messages, chat_template_kwargs)

    # ---------------------------------------------------------------- reading

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | Sequence[int] | Completion],
        steering: Steerings = None,
        *,
        chat_template_kwargs: TemplateVariables = None,
        progress: bool = False,
    ) -> list[Scored]:
        """Log-probabilities and entropies of given completions, teacher-forced in one pass.

        Args:
            completions: one per prompt: text, token ids, or a Completion.
            steering: as in :meth:`generate`; its scope counts positions as generation would.
            chat_template_kwargs: variables of the chat template.
        """
        encoded = self._encoder.encode_all(prompts, variables=chat_template_kwargs)
        check_is_list(completions, "completions")
        if len(completions) != len(encoded):
            raise ValueError(f"{len(completions)} completions for {len(encoded)} prompts: one for each")
        [steerings] = self._steerings({"steering": steering}, len(encoded))
        sequences = []
        for n, (ids, completion, compiled) in enumerate(zip(encoded, completions, steerings, strict=True)):
            try:
                whole = self._encoder.check(ids + self._encoder.completion(completion, ids))
                sequences.append((whole, len(ids), compiled))
            except (TypeError, ValueError) as error:
                raise named(error, f"completions[{n}]") from None
        _check_scored_scopes(sequences)
        scored: list[Scored | None] = [None] * len(sequences)
        with (
            self._turns,
            self._recording("score", len(sequences), ["steering"]) as record,
            tqdm(total=len(sequences), unit="completion", disable=not progress) as bar,
        ):
            for n, logprobs, entropies in self._engine.score(sequences, record):
                tokens, n_prompt, _ = sequences[n]
                scored[n] = Scored(tokens[n_prompt:], logprobs, entropies)
                self.usage.scored(n_prompt, len(tokens) - n_prompt)
                bar.update()
        return [s for s in scored if s is not None]

    def hidden_states(
        self,
        prompts: Sequence[Prompt],
        *,
        positions: Positions = -1,
        steering: Steerings = None,
        prefix: Prefix | None = None,
        chat_template_kwargs: TemplateVariables = None,
        progress: bool = False,
    ) -> Tensor:
        """The residual stream of every prompt after each block, at its last token or at chosen ones.

        Block i is transformers' ``hidden_states[i + 1]``, except the last, which is taken before the final norm.

        Args:
            positions: token positions of the prompt, special tokens and a prefix included (:meth:`encode` shows them);
                negative ones count from its end. One number, a list for all prompts, or a list per prompt, all of one
                length.
            steering: one for all prompts, or a list with one per prompt; None = unsteered. States are those after the
                steering of their block. The scope counts as in :meth:`generate`, and nothing is generated here: scope
                "response" steers the last token alone, "all" every token.

        Returns:
            fp32 on the CPU: ``[n, n_layers, hidden]``, or ``[n, n_positions, n_layers, hidden]`` for lists.

        Raises:
            IndexError: a prompt has no such position. ValueError: a steering that acts on none of the positions.
        """
        pinned = self._pinned(prefix)
        tokens = self._tokens(prompts, prefix, chat_template_kwargs)
        chosen, several = _positions(positions, [len(ids) for ids in tokens])
        [steerings] = self._steerings({"steering": steering}, len(tokens))
        readings = [Reading(*each) for each in zip(tokens, chosen, steerings, strict=True)]
        for n, reading in enumerate(readings):
            _check_read_scope(n, reading)
        n_places = sum(map(len, chosen))
        out = torch.empty(n_places, self.spec.n_layers, self.spec.hidden_size, dtype=torch.float32, device="cpu")

        def keep(places: list[int], layer: int, h: Tensor) -> None:
            out[places, layer] = h.float().cpu()

        with self._turns:
            for _ in self._read("hidden_states", readings, keep, pinned, progress):
                pass
        return out if several is None else out.view(len(tokens), several, *out.shape[1:])

    def _read(
        self,
        call: str,
        prompts: list[Reading],
        visit: Callable[[list[int], int, Tensor], None],
        pinned: PinnedPrefix | None,
        progress: bool,
    ) -> Iterator[list[int]]:
        """Run prompts in batches; ``visit`` is as in :meth:`Engine.read`. Yields the indices of each batch."""
        with (
            self._recording(call, len(prompts), ["steering"]) as record,
            tqdm(total=len(prompts), unit="prompt", disable=not progress) as bar,
        ):
            for batch in self._engine.read(prompts, visit, record, pinned):
                for n in batch:
                    self.usage.read(prompts[n].end, prompts[n].reused(pinned))
                yield batch
                bar.update(len(batch))

    def project(
        self,
        prompts: Sequence[Prompt],
        directions: DirectionSet | Sequence[Direction],
        *,
        prefix: Prefix | None = None,
        chat_template_kwargs: TemplateVariables = None,
        progress: bool = False,
    ) -> Tensor:
        """⟨h, u⟩ of every prompt's last token: ``[n, n_directions, n_layers]`` fp32, CPU; states are never stored."""
        if isinstance(directions, Direction) or not isinstance(directions, DirectionSet | Sequence):
            raise TypeError(f"directions is a DirectionSet or a list of Direction, not {type(directions).__name__}")
        chosen = list(directions)
        if not chosen:
            raise ValueError("directions is empty: nothing to project on")
        for d in chosen:
            if not isinstance(d, Direction):
                raise TypeError(f"directions is a list of Direction or a DirectionSet, it holds a {type(d).__name__}")
        size = (self.spec.n_layers, self.spec.hidden_size)
        for d in chosen:
            if (d.n_layers, d.hidden_size) != size:
                raise ValueError(
                    f"direction {d.name!r} has {d.n_layers} blocks of size {d.hidden_size}, "
                    f"the model has {size[0]} of size {size[1]}"
                )
            self.check_model(d)
        bank = torch.stack([d.vectors * (d.scale != 0)[:, None] for d in chosen], dim=1).to(self.device)
        pinned = self._pinned(prefix)
        tokens = self._tokens(prompts, prefix, chat_template_kwargs)
        out = torch.empty(len(tokens), len(chosen), self.spec.n_layers, dtype=torch.float32, device="cpu")

        def dot(rows: list[int], layer: int, h: Tensor) -> None:
            out[rows, :, layer] = (h.float() @ bank[layer].T).cpu()

        with self._turns:
            for _ in self._read("project", _at_the_end(tokens), dot, pinned, progress):
                pass
        return out

    def extract_direction(
        self,
        positive: Sequence[Prompt],
        negative: Sequence[Prompt],
        name: str,
        *,
        method: Literal["pca", "mean_difference"] = "pca",
        chat_template_kwargs: TemplateVariables = None,
        progress: bool = False,
    ) -> Direction:
        """The direction from the negative to the positive prompts at the last token, per block (Icon², step 1).

        Args:
            positive, negative: prompts; ``negative[i]`` is the counterpart of ``positive[i]``. Lists of different
                length are no pairs: "mean_difference" takes them (harmful and harmless instructions, say).
            method: "pca", the first singular vector of the uncentred differences (the paper's), or "mean_difference".
            chat_template_kwargs: variables of the chat template.

        Returns:
            Unit vectors, signed so that the mean difference projects positively, with the health figures
            ``cos_mean_difference``, ``sign_agreement``, ``split_half_cosine`` and ``contrast`` per block. From lists of
            different length only ``contrast``: the others need pairs, and ``metadata["not_computed"]`` names them.

        Raises:
            ValueError: lists of different length with "pca", or fewer than two prompts in a list; no difference at all
                at some block.
        """
        if method not in ("pca", "mean_difference"):
            raise ValueError(f"method must be 'pca' or 'mean_difference', not {method!r}")
        sides = [
            self._encoder.encode_all(side, which, variables=chat_template_kwargs)
            for side, which in ((positive, "positive"), (negative, "negative"))
        ]
        paired = len(positive) == len(negative)
        if not paired and method == "pca":
            raise ValueError(
                f"{len(positive)} positive and {len(negative)} negative prompts: with method='pca' they go pairwise. "
                f"method='mean_difference' takes lists of different length"
            )
        if min(len(positive), len(negative)) < 2:
            raise ValueError(
                f"a direction needs at least 2 pairs of prompts, not {len(positive)}"
                if paired
                else f"a direction needs at least 2 prompts on each side, not {len(positive)} and {len(negative)}"
            )
        if not paired:
            vectors, health = self._mean_difference(sides[0], sides[1], progress)
            counts = {"n_positive": str(len(positive)), "n_negative": str(len(negative))}
            left_out = f"{', '.join(SideStatistics.NEED_PAIRS)}: they need pairs of prompts"
            return self._direction(name, vectors, method, health, {**counts, "not_computed": left_out})
        interleaved = [tokens for pair in zip(*sides, strict=True) for tokens in pair]
        statistics = ContrastStatistics(self.spec.n_layers, self.spec.hidden_size, self.device)
        states = PairStates(self.spec.n_layers)
        with self._turns, computing(self._engine.model):  # the statistics too are in dtypes of their own
            for _ in self._read("extract_direction", _at_the_end(interleaved), states.keep, None, progress):
                pairs = states.take()
                if pairs is not None:
                    statistics.add(*pairs)
            vectors, health = statistics.direction(method)
        return self._direction(name, vectors, method, health, {"n_pairs": str(len(positive))})

    def _mean_difference(
        self, positive: list[list[int]], negative: list[list[int]], progress: bool
    ) -> tuple[Tensor, dict[str, list[float]]]:
        """Mean state of the positive prompts less that of the negative ones: unit vectors and health figures."""
        statistics = SideStatistics(self.spec.n_layers, self.spec.hidden_size, self.device)
        states = PromptStates(self.spec.n_layers)
        with self._turns:
            for _ in self._read("extract_direction", _at_the_end(positive + negative), states.keep, None, progress):
                for prompts, seen in states.take_whole().items():
                    is_negative = torch.tensor([n >= len(positive) for n in prompts], device=seen.device)
                    statistics.add(0, seen[~is_negative])
                    statistics.add(1, seen[is_negative])
            return statistics.direction()

    def _direction(
        self, name: str, vectors: Tensor, method: str, health: Mapping[str, Sequence[float]], facts: Mapping[str, str]
    ) -> Direction:
        return Direction(
            name,
            vectors,
            torch.ones(self.spec.n_layers, dtype=torch.float32, device="cpu"),
            model=self.fingerprint,
            model_name=self.name,
            method=method,
            health=health,
            metadata={**facts, "model_hint": self.spec.family},
        )


class Prefix:
    """A prefix (see :meth:`Runtime.prefix`): prefilled where its ``with`` block begins, given back at the end.

    A stream that began inside the block may go on after it.
    """

    def __init__(self, runtime: Runtime, start: Prompt, variables: TemplateVariables = None):
        self._runtime, self._start = runtime, start
        self._template = runtime._encoder.template_for(variables)
        encoder = runtime._encoder
        self.tokens = tuple(
            encoder.beginning(start)
            if isinstance(start, str)
            else encoder.encode(start, generation_prompt=False, template=self._template)
        )
        self._pinned: PinnedPrefix | None = None

    def __enter__(self) -> Prefix:
        if self._pinned is not None:
            raise RuntimeError("this prefix is pinned already: it is inside its `with` block")
        with self._runtime._turns:
            self._pinned = self._runtime._engine.pin(self.tokens)
            self._runtime.usage.read(len(self.tokens))
        return self

    def __exit__(self, *exc: object) -> None:
        with self._runtime._turns:
            if self._pinned is not None:
                self._runtime._engine.unpin(self._pinned)
                self._pinned = None

    def __repr__(self) -> str:
        return f"Prefix({len(self.tokens)} tokens, {'pinned' if self._pinned is not None else 'not pinned'})"

    @property
    def pinned(self) -> PinnedPrefix:
        if self._pinned is None:
            raise RuntimeError("this prefix is not pinned: use it inside `with rt.prefix(...) as prefix:`")
        return self._pinned

    def join_all(self, prompts: Sequence[Prompt], variables: TemplateVariables = None) -> list[list[int]]:
        """The whole token ids of prompts that continue this prefix; ``variables`` are set beside the prefix's own.

        Raises:
            ValueError: a chat on a prefix that is not one (or the reverse), or a template whose rendering of the whole
                does not begin with the prefix's tokens.
        """
        encoder = self._runtime._encoder
        check_is_list(prompts)
        if not is_chat(self._start):
            for n, prompt in enumerate(prompts):
                if is_chat(prompt):
                    raise ValueError(
                        f"prompts[{n}]: a chat cannot continue a prefix of text or ids; pass the prefix as messages"
                    )
            text = [
                p
                if not isinstance(p, str)
                else encoder._need_tokenizer("a text prompt").encode(p, add_special_tokens=False)
                for p in prompts
            ]
            return [encoder.check([*self.tokens, *ids]) for ids in encoder.encode_all(text)]
        whole = []
        template = self._template.with_variables(variables)
        for n, prompt in enumerate(prompts):
            if not is_chat(prompt):
                raise ValueError(f"prompts[{n}]: only a chat can continue a prefix of messages")
            ids = encoder.encode([*self._start, *prompt], template=template)
            if tuple(ids[: len(self.tokens)]) != self.tokens:
                raise ValueError(
                    f"prompts[{n}]: with this chat template the whole chat does not begin with the prefix's tokens; "
                    f"pass the common part as token ids"
                )
            whole.append(ids)
        return whole


_RUNTIME_OPTIONS = (
    "keep_model", "kv_memory", "max_rows", "max_directions", "max_terms", "page_size", "split_pages", "prefill_chunk",
    "cuda_graphs",
)  # fmt: skip


def _check_samples(n: int, sampling: Sampling) -> None:
    """Refuse samples that would all be alike."""
    if not _is_int(n) or n < 1:
        raise ValueError(f"n, the samples of a prompt, must be a whole number of at least 1, not {n!r}")
    if n > 1 and not sampling.do_sample:
        raise ValueError(
            f"n={n} with greedy decoding would give {n} equal completions: give a temperature, or do_sample=True"
        )


def _check_scopes(requests: Sequence[Request], branches: Sequence[str]) -> None:
    """Refuse a steering of generated tokens where a request feeds none: a token is fed only if another follows it.

    Raises:
        ValueError: the message names the first such prompt, or says that it holds for all of them.
    """
    for k, name in enumerate(branches):
        scopes = [s.scope if (s := r.branches[k].steering) is not None else None for r in requests]
        short = [r for r, scope in zip(requests, scopes, strict=True) if scope == "generated" and r.budget == 1]
        if short:
            where = "" if len(short) == len(requests) else f"prompts[{short[0].index}]: "
            raise ValueError(
                f"{where}{name} has scope 'generated' and would steer nothing: with room for 1 new token, that token "
                f"is drawn at the last prompt token, which this scope leaves alone, and is never fed. Allow at least 2 "
                f"new tokens (max_new_tokens=2), or use .with_scope('response')"
            )


def _check_scored_scopes(sequences: Sequence[tuple[Sequence[int], int, CompiledSteering | None]]) -> None:
    """Refuse to score under steerings of generated tokens of which none has a position. One that has none in its own
    completion, beside others that do, is like a row that ended at once: the record says so.

    Raises:
        ValueError: nothing else is steered, and no completion has a second token.
    """
    steered = [(s.scope, len(tokens) - n) for tokens, n, s in sequences if s is not None]
    if steered and all(scope == "generated" and n_tokens < 2 for scope, n_tokens in steered):
        raise ValueError(
            "steering has scope 'generated' and would steer nothing: no completion has a second token, and the first "
            "is scored at the last prompt token, which this scope leaves alone. Score longer completions, or use "
            ".with_scope('response')"
        )


def _at_the_end(prompts: Sequence[Sequence[int]]) -> list[Reading]:
    return [Reading(tokens, (len(tokens) - 1,)) for tokens in prompts]


def _positions(asked: Positions, lengths: Sequence[int]) -> tuple[list[list[int]], int | None]:
    """The positions of every prompt, counted from 0, and how many each has (None: one number was asked for).

    Raises:
        TypeError: not numbers. ValueError: none, or lists that do not fit. IndexError: beyond a prompt.
    """
    asked = _plain(asked)
    if _is_int(asked):
        return [[_position(asked, length, n)] for n, length in enumerate(lengths)], None  # type: ignore[arg-type]
    if not isinstance(asked, Sequence) or isinstance(asked, str):
        raise TypeError(f"positions is a whole number or a list of them, not {asked!r}")
    per_prompt = list(asked) if any(isinstance(p, Sequence) for p in asked) else [asked] * len(lengths)
    if len(per_prompt) != len(lengths):
        raise ValueError(f"positions has {len(per_prompt)} lists for {len(lengths)} prompts: one for each")
    for p in per_prompt or [asked]:
        if not isinstance(p, Sequence) or isinstance(p, str) or not all(map(_is_int, p)):
            raise TypeError(f"positions is a whole number, a list of them, or one such list per prompt, not {asked!r}")
    counts = {len(p) for p in per_prompt} or {len(asked)}  # type: ignore[arg-type]
    if len(counts) > 1:
        raise ValueError(f"positions has lists of {sorted(counts)} numbers: every prompt needs as many as the others")
    [count] = counts
    if not count:
        raise ValueError("positions is empty: nothing to read")
    found = [[_position(p, length, n) for p in per_prompt[n]] for n, length in enumerate(lengths)]  # type: ignore[attr-defined]
    return found, count


def _position(position: int, length: int, n: int) -> int:
    if not -length <= position < length:
        raise IndexError(
            f"prompts[{n}] has {length} tokens, positions 0 to {length - 1} (or -{length} to -1), not {position}"
        )
    return position % length


def _check_read_scope(n: int, reading: Reading) -> None:
    """Refuse a steering that acts on none of the tokens that are read."""
    steering, length = reading.steering, len(reading.tokens)
    if steering is not None and reading.end <= first_steered(steering, length):
        first = "the last token alone" if steering.scope == "response" else "generated tokens alone, and there are none"
        raise ValueError(
            f"prompts[{n}]: the steering has scope {steering.scope!r}, which steers {first}: no state that is read "
            f"would change. Read the last token too, or use .with_scope('all')"
        )


def _in_order(outputs: Iterable[BranchedOutput]) -> OutputList[BranchedOutput]:
    return OutputList(sorted(outputs, key=lambda output: output.index))  # samples of a prompt come in order


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", not {device!r}') from None
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", not {device!r}')
    if where.type == "cuda" and not (where.index or 0) < torch.cuda.device_count():
        raise ValueError(
            f"device={device!r}: torch sees {torch.cuda.device_count()} CUDA devices here; try device='auto'"
        )
    return where


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """numpy's and torch's whole numbers, and arrays or lists of them, as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
