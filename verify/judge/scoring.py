"""The published scoring functions of a subject: which it has, and guarded calls of them within what they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from verify.checks import Measure
from verify.errors import Refused, Wrong
from verify.judge.guarded import Call, call
from verify.judge.interpreter import quicken
from verify.judge.offers import Attempt, Offers
from verify.judge.problems import Problem, Shape
from verify.judge.tolerance import accuracy
from verify.record import trail
from verify.record.causes import INACCURATE
from verify.subject.offered import narrowed
from verify.subject.published import CONFIG_DEFAULTS, DISPATCH, dispatch_alone
from verify.subject.refusal import REFUSALS, crash, refusal
from verify.subject.subject import Subject

if TYPE_CHECKING:
    import numpy as np

KERNELS, SCORING, CONFIG = "vllm.core.kernels.triton_scoring", "vllm.core.scoring", "vllm.core.config"
KERNEL, RANKER = "triattention_scoring", "rank_keys"

#: The modules of the functions that are not in ``SCORING``.
_MODULES = {KERNEL: KERNELS, RANKER: "ranking"}

#: The two published paths: the name in their functions, and the name in messages.
PATHS = {"triton": "Triton", "pytorch": "PyTorch"}


class OtherShape(AssertionError):
    """Scores have another shape than the problem asks for."""


def of_shape(scores: Any, shape: Shape, where: str = "") -> None:
    """Raise OtherShape, beginning with ``where``, unless the scores are ``[B, H*G, N]``."""
    given, wanted = tuple(scores.shape), (shape.b, shape.h * shape.g, shape.n)
    if given != wanted:
        raise OtherShape(f"{where}the scores have shape {given}, expected {wanted}")


@dataclass(frozen=True)
class Scorer:
    """One published scoring function of a subject, and the path on which it scores."""

    subject: Subject
    path: str
    name: str
    device: str

    def __call__(self, problem: Problem) -> np.ndarray:
        """The scores in float64 on the CPU, ``[B, H*G, N]``. Raises OtherShape."""
        found = self.call(problem)
        of_shape(found.result, problem.shape, f"{self.where(problem.shape)}: ")
        return found.scores

    def judged_first(self, problem: Problem, measure: Measure) -> np.ndarray:
        """The scores of a problem without what the check tests, within class B of the oracle.

        So a scorer that is inaccurate everywhere is not accused of what the check tests: Wrong has its own cause.
        """
        scores = self(problem)
        self.judge_first(scores, problem, measure)
        return scores

    def judge_first(self, scores: np.ndarray, problem: Problem, measure: Measure) -> None:
        """The same for ``scores`` that were computed just before."""
        found = accuracy(scores, problem.case)
        where = f"{self.where(problem.shape)}, {found.where}"
        measure("error before the test", *found.class_b, where=where, cause=INACCURATE)

    def call(self, problem: Problem) -> Call:
        return engine(self.subject, self.path, problem, through=self.name)

    def where(self, shape: Shape) -> str:
        """The path and the problem in words, for a message."""
        return f"{path_name(self.subject, self.path)} path, {self.name}, {shape.told()}"

    @property
    def offers(self) -> Offers:
        key = (self.subject.option, self.path, self.name, self.device)
        if key not in _OFFERS:
            _OFFERS[key] = Offers(
                self.subject,
                lambda problem: engine_call(self.subject, self.path, problem, through=self.name)(),
                self.device,
                narrowed(self.subject, self.path),
            )
        return _OFFERS[key]


#: The cause of crashes, and of scores of another shape, with several query heads per KV head.
GROUPS = "several query heads per KV head are not scored"

#: What the functions that refused something take, as long as this process lives.
_OFFERS: dict[tuple[str, ...], Offers] = {}


def scorers(subject: Subject, path: str, device: str) -> list[Scorer]:
    """Every published function of the subject that scores on a path. Raises SubjectLacks if there is none."""
    return [Scorer(subject, path, name, device) for name in entries(subject, path)]


def draws(
    subject: Subject, path: str, device: str, seed: int, count: int, **choices: tuple[Any, ...]
) -> Iterator[tuple[Attempt, Scorer]]:
    """Attempts to judge ``count`` random problems, spread over the functions of a path, each within what it takes.

    Raises SubjectLacks if the path has no function, Refused if every problem is refused.
    """
    return spread(subject, path, device, lambda offers, part: offers.drawn(seed, count, part, **choices))


def spread(
    subject: Subject, path: str, device: str, attempts: Callable[[Offers, slice], Iterator[Attempt]]
) -> Iterator[tuple[Attempt, Scorer]]:
    """``attempts`` with every function of a path, which gets a part of the problems; see ``draws``."""
    found = scorers(subject, path, device)
    refused: Refused | None = None
    judged = False
    for number, scorer in enumerate(found):
        try:
            for attempt in attempts(scorer.offers, slice(number, None, len(found))):
                yield attempt, scorer
                judged |= attempt.refused is None
        except Refused as error:
            refused = error
    if refused is not None and not judged:
        raise refused


#: The published functions that score on each path, first the one that most checks call.
ENTRIES = {
    "triton": ("compute_scores_triton", KERNEL),
    "pytorch": ("compute_scores_pytorch",),
    "ranking": (RANKER,),
}


def entries(subject: Subject, path: str) -> tuple[str, ...]:
    """The functions by which a subject scores on a path. Raises SubjectLacks if it has none."""
    names = ENTRIES[path]
    found = tuple(name for name in names if subject.offers(_module_of(name), name))
    if not found and path == "pytorch" and dispatch_alone(subject.offers):
        return (DISPATCH[1],)
    if not found:
        subject.attribute(_module_of(names[0]), names[0])  # says what is absent
    return found


@contextmanager
def grouped(subject: Subject) -> Iterator[None]:
    """Inside, a crash of the subject, or scores of another shape, is Wrong with the cause ``GROUPS``."""
    try:
        yield
    except Exception as error:  # a subject may crash in any way
        if told := str(error) if isinstance(error, OtherShape) else crash(error, subject):
            raise Wrong(told, GROUPS) from error
        raise


def _module_of(name: str) -> str:
    return _MODULES.get(name, SCORING)


def path_name(subject: Subject, path: str) -> str:
    """The name of a path in messages; a subject may score with something else than PyTorch."""
    return subject.plain_path if path == "pytorch" else PATHS.get(path, path)


def kernel(subject: Subject, problem: Problem, **more: Any) -> Call:
    """A guarded call of the published ``triattention_scoring``, or of the engine function where a subject has only
    that; ``more`` are further arguments. Raises Refused as ``engine`` does.
    """
    return engine(subject, "triton", problem, through=KERNEL if more else entries(subject, "triton")[-1], **more)


def engine(subject: Subject, path: str, problem: Problem, *, through: str | None = None, **more: Any) -> Call:
    """A guarded call of the first of ``entries``, or of the function ``through``.

    Raises SubjectLacks if the subject has no such function, Refused if the problem is outside what its author says it
    takes, or if it refuses this problem and takes a plainer one, Wrong if it takes none, and whatever else the call
    raises.
    """
    name = through or entries(subject, path)[0]
    offers = Scorer(subject, path, name, problem.keys.device.type).offers
    offers.require(problem.shape)
    trail.note(
        kind="scoring",
        path=path_name(subject, path),
        function=name,
        **problem.shape.properties(),
        **{"class": "unknown"},
    )
    try:
        return call(engine_call(subject, path, problem, through=name, **more), problem.tensors())
    except REFUSALS as error:
        if at := refusal(error, subject):
            offers.judge(error, at, problem.shape, more)
        raise


def engine_call(
    subject: Subject, path: str, problem: Problem, *, through: str | None = None,
    settings: Mapping[str, Any] | None = None, **more: Any,
) -> Callable[[], Any]:  # fmt: skip
    """The call that ``engine`` guards, unguarded, for a check that times it; ``settings`` are further options of the
    configuration.
    """
    shape = problem.shape
    quicken()
    name = through or entries(subject, path)[0]
    compute = subject.attribute(_module_of(name), name)
    if name == KERNEL:
        return lambda: compute(**problem.scoring_arguments(), **more)
    options = {
        "kv_budget": 256, "pruning_mode": "per_head", "score_aggregation": shape.aggregation, "rope_style": shape.style,
        "use_triton_scoring": path == "triton", "head_dim": shape.d, "num_kv_heads": shape.h,
        "disable_mlr": shape.disable_mlr, "disable_trig": shape.disable_trig, **(settings or {}),
    }  # fmt: skip
    arguments = {
        "key_states": problem.keys, "cache_positions": None, "head_stats": problem.head_stats, "omega": problem.omega,
        "offsets": problem.offsets, "freq_scale_sq": problem.freq_weight, "round_start": shape.t,
    }  # fmt: skip
    if name == RANKER:
        del arguments["cache_positions"]
        return lambda: compute(**arguments)
    # made within the call, because a configuration may refuse an option too
    return lambda: compute(**arguments, config=configuration(subject, options), **more)


def configuration(subject: Subject, options: Mapping[str, Any]) -> Any:
    """The subject's configuration with these options, or a stand-in with the published fields if it has no class."""
    import torch

    if subject.offers(CONFIG, "TriAttentionConfig"):
        return subject.attribute(CONFIG, "TriAttentionConfig")(**options)
    return SimpleNamespace(**{**CONFIG_DEFAULTS[CONFIG], "topk_dtype": torch.float32, **options})
