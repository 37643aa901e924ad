"""What lies beside the parameters in a checkpoint, told apart by names.

Σ is of the parameters that are trained. Checkpoints of other writers also hold what belongs to
them: moments of an optimizer, running statistics, averaged copies, counters, random streams. Known
companions are left out; names that may be either are refused; `only` and `skip` decide.

A key such as `layers.0.weight` or `params/dense/kernel` has parts, and each part has words:
`ExponentialMovingAverage` and `exponential_moving_average` have the same ones.
"""

import difflib
import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from esljax._checks import refuse
from esljax.files.archives import Header

OPTIMIZER, STATISTICS = "state of an optimizer", "running statistics"
COPIES, TRAINING, RANDOM = "averaged copies", "state of the training", "random streams"
BUFFERS, SKIPPED, NOT_ONLY = "buffers", "chosen by skip", "not chosen by only"

# Words that follow each other in one part, anywhere in a key. The first that matches counts.
_PHRASES = {
    STATISTICS: (
        "running mean|running var|running variance|running std|running avg|running average"
        "|running stats|running statistics|running sum|running min|running max|running norm"
        "|moving mean|moving var|moving variance|moving std|moving min|moving max|moving stats"
        "|moving averages|moving avg|batch stats|batch stat|batch statistics|bn stats|norm stats"
        "|num batches|population mean|population var|population variance"
    ),
    COPIES: (
        "ema|emas|swa|swag|polyak|shadow|exponential moving average|moving average|n averaged"
        "|averaged model|averaged params|averaged parameters|averaged weights|averaged state"
        "|average model|average params|average parameters|average weights|average state"
        "|avg model|avg params|avg parameters|avg weights|avg state|mean params|mean weights"
        "|params avg|parameters avg|weights avg|model avg|params average|parameters average"
        "|weights average|model average|params averaged|weights averaged|model averaged"
        "|slow weights|slow params|target params|target parameters|target network|target net"
        "|target model|target weights|teacher params|teacher model|momentum encoder"
    ),
    OPTIMIZER: (
        "opt state|opt states|optim state|optim states|optimizer state|optimizer states"
        "|optimiser state|optimiser states|exp avg|exp avgs|exp inf|momentum buffer|momentum buf"
        "|square avg|square avgs|sq avg|grad avg|acc delta|param groups|first moment|first moments"
        "|second moment|second moments|inner state|adam state|trace state|accumulated grad"
        "|accumulated grads|accumulated gradients|grad accum|grad acc|acc grads|grad buffer"
        "|gradient accumulator|master params|master weights|beta 1 power|beta 2 power"
    ),
    RANDOM: (
        "rng|rngs|prng|prngs|prng key|random state|random states|random key|random seed"
        "|random stream|dropout key|dropout seed|rng state|rng key"
    ),
    TRAINING: (
        "lr scheduler|lr schedulers|lr schedule|scheduler state|grad scaler|loss scaler"
        "|amp scaler|loss scale|dynamic scale|early stopping|hyper parameters"
    ),
}
# Parts that are one of these as a whole.
_PARTS = {
    OPTIMIZER: (
        "opt|opts|optim|optims|optimizer|optimizers|optimiser|optimisers|momentum|momenta|moments"
        "|adam|adamw|adagrad|adadelta|adafactor|adamax|nadam|radam|rmsprop|rms prop|lamb|lion|sgd"
        "|lbfgs|grad|grads|gradient|gradients"
    ),
    TRAINING: (
        "scheduler|schedulers|sched|scheds|callbacks|loops|hparams|hyperparams|hyperparameters"
        "|metrics|metric|history|dataloader|dataloaders|data loader|data iter|data iterator"
        "|trainer state|training state|train metrics"
    ),
}
_BEGINNINGS = {OPTIMIZER: {"optimizer", "optimizers", "optimiser", "optim"}}
# The last part of a key, if it is one number or an integer.
_COUNTERS = {"step", "steps", "epoch", "epochs", "iteration", "iterations", "iter", "iters"}
_COUNTERS |= {"count", "counts", "counter", "seen", "updates", "batches", "version", "tick"}
_NUMBERS = {"lr", "learning rate", "last lr", "base lr", "current lr", "loss", "best loss", "score"}
_NUMBERS |= {"best score", "accuracy", "best accuracy", "step count", "global step", "train step"}
_NUMBERS |= {"current step", "num steps", "num updates", "t", "time", "wall time"} | _COUNTERS
# The last word of such a part, if it is one number.
_ENDINGS = {
    "loss",
    "acc",
    "accuracy",
    "metric",
    "score",
    "lr",
    "epoch",
    "step",
    "steps",
    "perplexity",
}
_BUFFERS = {"position ids", "token type ids", "relative position index", "cache index"}

# Words that may be of a parameter or of a companion: the keys around them decide, or the user.
_MOMENTS = {"m", "v", "mu", "nu", "trace", "velocity", "momentum", "moment", "accumulator"}
_MOMENTS |= {"accumulators", "accum", "slot", "slots", "buf", "mt", "vt", "vhat", "mhat", "hessian"}
_MOMENTS |= {"square", "squares", "sq", "preconditioner", "adam", "rms"}
_COPIES = {"target", "teacher", "best", "old", "prev", "previous", "copy", "backup", "frozen"}
_COPIES |= {"avg", "average", "averaged", "smoothed", "lagged", "slow", "reference", "ref", "lag"}
_COPIES |= {"snapshot", "anchor", "initial", "original", "stale", "delayed", "ensembled", "mean"}
_COUNTERPARTS = {"online", "student", "policy", "main", "live", "current", "local", "behavior"}
_COUNTERPARTS |= {"new", "fast", "params", "model", "weights", "net", "network", "module", "eval"}
_MODELS = {"params", "parameters", "model", "weights", "net", "network", "module", "variables"}
_SPREADS = {"var", "variance", "covariance", "cov", "m2"}
# A mean beside one of these is of a learned distribution, and a v beside a q of an attention.
_LEARNED = {"log var", "logvar", "log std", "logstd", "log sigma", "log scale", "sigma", "rho"}
_ATTENTION = {"q", "k", "query", "key"}
_WRAPPERS = {"value", "raw value"}


class Choice(NamedTuple):
    """The keys of one checkpoint, parted."""

    kept: tuple[str, ...]
    left_out: dict[str, str]
    """The other keys, and why they are left out."""
    doubtful: dict[str, str]
    """Keys that may be parameters or companions, and what they may be."""


class Selection:
    """The patterns `only` and `skip`, which are matched against whole keys."""

    def __init__(self, only: Iterable[str] | str = (), skip: Iterable[str] | str = ()):
        self.only, self.skip = _patterns("only", only), _patterns("skip", skip)
        self._used: set[tuple[str, str]] = set()
        self._keys: dict[str, None] = {}
        self._choices: dict[tuple[tuple[str, Header], ...], Choice] = {}

    def __bool__(self) -> bool:
        return bool(self.only or self.skip)

    def plain(self, headers: Mapping[str, Header]) -> Choice:
        """Return the arrays that the patterns choose, whatever their names mean."""
        self._keys |= dict.fromkeys(headers)
        left_out = self._by_patterns(headers)
        return Choice(tuple(key for key in headers if key not in left_out), left_out, {})

    def parameters(self, headers: Mapping[str, Header]) -> Choice:
        """Return the keys of the parameters.

        A companion is kept if a pattern of `only` chooses companions alone.
        """
        if (seen := tuple(headers.items())) not in self._choices:
            self._choices[seen] = self._parted(headers)
        return self._choices[seen]

    def check_used(self, where: str) -> None:
        """Reject patterns that have matched no key so far, and name the nearest keys."""
        for argument in ("only", "skip"):
            for pattern in getattr(self, argument):
                if (argument, pattern) not in self._used:
                    near = difflib.get_close_matches(pattern, self._keys, n=3, cutoff=0.3)
                    names = ", ".join(f"`{key}`" for key in near or list(self._keys)[:3])
                    raise refuse(
                        argument,
                        f"match keys of {where} (the nearest are {names})",
                        f"{pattern!r} matches none",
                    )

    def _parted(self, headers: Mapping[str, Header]) -> Choice:
        chosen = self.plain(headers)
        left_out, doubtful = dict(chosen.left_out), {}
        known = {key: _known(key, headers[key]) for key in chosen.kept}
        rest = [key for key in chosen.kept if known[key] is None]
        asked = set()
        for pattern in self.only:
            matched = self._matched("only", pattern, chosen.kept)
            asked |= set() if set(matched) & set(rest) else set(matched)
        left_out |= {
            key: reason for key, reason in known.items() if reason is not None and key not in asked
        }
        for key, (reason, certain) in ({} if self.only else _by_neighbors(rest, headers)).items():
            (left_out if certain else doubtful)[key] = reason
        kept = tuple(key for key in chosen.kept if key not in left_out and key not in doubtful)
        return Choice(kept, left_out, doubtful)

    def _by_patterns(self, keys: Iterable[str]) -> dict[str, str]:
        keys = list(keys)
        only = {key for pattern in self.only for key in self._matched("only", pattern, keys)}
        skip = {key for pattern in self.skip for key in self._matched("skip", pattern, keys)}
        return {
            key: SKIPPED if key in skip else NOT_ONLY
            for key in keys
            if key in skip or (self.only and key not in only)
        }

    def _matched(self, argument: str, pattern: str, keys: Iterable[str]) -> list[str]:
        dotted = pattern.replace("/", ".")
        matched = [
            key
            for key in keys
            if key == pattern or fnmatch.fnmatchcase(key.replace("/", "."), dotted)
        ]
        if matched:
            self._used.add((argument, pattern))
        return matched


def _patterns(argument: str, given: Iterable[str] | str) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else given
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise refuse(argument, "hold patterns of keys, as in 'opt_state/*'", f"is {given!r}")
    return patterns


def described(left_out: Mapping[str, str]) -> str:
    """Return the keys that were left out in a phrase, by reason."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in left_out.items():
        by_reason.setdefault(reason, []).append(key)
    return "; ".join(f"{reason} ({several(keys)})" for reason, keys in by_reason.items())


def several(keys: Sequence[str]) -> str:
    """Return the first few of the keys, and how many more there are."""
    more = f" and {len(keys) - 3} more" if len(keys) > 4 else ""
    return ", ".join(f"`{key}`" for key in keys[: 3 if more else 4]) + more


# What names mean


def _words(part: str) -> list[str]:
    spaced = re.sub(r"([a-z0-9])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3 \2\4", part)
    return re.findall(r"[a-z]+|[0-9]+", spaced.lower())


def _parts(key: str) -> list[str]:
    return [part for part in re.split(r"[/.]", key) if part]


def _plain(part: str) -> str:
    """The words of a part without numbers at its end, as in `Adam_1`."""
    words = _words(part)
    while words and words[-1].isdigit():
        words = words[:-1]
    return " ".join(words)


_COMPILED = {
    reason: re.compile(rf"(?:^| )(?:{phrases})(?: |$)") for reason, phrases in _PHRASES.items()
}
_JOINED = {
    phrase.replace(" ", ""): reason
    for reason, phrases in _PHRASES.items()
    for phrase in phrases.split("|")
}
_WHOLE = {reason: set(parts.split("|")) for reason, parts in _PARTS.items()}


@functools.lru_cache(100_000)
def _of_part(part: str) -> str | None:
    """Return what one part of a key surely says of it."""
    words = " ".join(_words(part))
    for reason, phrase in _COMPILED.items():
        if phrase.search(words):
            return reason
    for reason, whole in _WHOLE.items():
        if _plain(part) in whole:
            return reason
    for reason, first in _BEGINNINGS.items():
        if words.split(" ")[0] in first:
            return reason
    return _JOINED.get(part.lower())


def _known(key: str, header: Header) -> str | None:
    """Return what a key surely is, if it is no parameter."""
    parts = _parts(key)
    reason = next((reason for part in parts if (reason := _of_part(part))), None)
    if reason is not None or not parts:
        return reason
    integer = header.dtype is None or header.dtype.kind in "iu"
    leaf = _plain(_leaf(parts)[-1])
    words = leaf.split(" ")
    if integer and leaf in _BUFFERS:
        return BUFFERS
    if "parametrizations" in parts and leaf in ("u", "v"):
        return BUFFERS
    if integer and {"key", "keys", "seed", "seeds"} & set(words):
        return RANDOM
    if integer and set(words) & _COUNTERS:
        return TRAINING
    number = header.size <= 1 and (leaf in _NUMBERS or words[-1] in _ENDINGS)
    return TRAINING if number else None


def _leaf(parts: list[str]) -> list[str]:
    return parts[:-1] if len(parts) > 1 and _plain(parts[-1]) in _WRAPPERS else parts


def _by_neighbors(
    keys: Sequence[str], headers: Mapping[str, Header]
) -> dict[str, tuple[str, bool]]:
    """Return what keys may be, by the keys around them, and whether that is certain."""
    shapes = {tuple(_parts(key)): headers[key].shape for key in keys}
    if len(shapes) == 1:
        return {}
    answers = {
        key: next(
            (
                answer
                for place in range(len(parts))
                if (answer := _marked(parts, place, shapes)) is not None
            ),
            None,
        )
        for key, parts in ((key, tuple(_parts(key))) for key in keys)
    }
    return {key: answer for key, answer in answers.items() if answer is not None}


def _marked(
    parts: tuple[str, ...], place: int, shapes: Mapping[tuple[str, ...], tuple[int, ...]]
) -> tuple[str, bool] | None:
    """Return what one part says of a key, where other keys bear it out."""
    words, head, tail = _words(parts[place]), parts[:place], parts[place + 1 :]
    marks = set(words) & (_MOMENTS | _COPIES | _SPREADS | {"u"})
    if not marks:
        return None
    whole, rest = _plain(parts[place]), [word for word in words if word not in marks]
    leaf = len(_leaf(list(parts))) == place + 1
    siblings = {
        _plain(one[place]): shape == shapes[parts]
        for one, shape in shapes.items()
        if len(one) > place and one[:place] == head and one[place + 1 :] == tail and one != parts
    }
    if leaf and whole in {"mean"} | _SPREADS:
        if set(siblings) & _LEARNED:
            return None
        paired = set(siblings) & (_SPREADS if whole == "mean" else {"mean"})
        return STATISTICS, bool(paired)
    reason = OPTIMIZER if marks & _MOMENTS else COPIES
    if leaf and words[-1] in ("u", "v") and " ".join([*words[:-1], "orig"]) in siblings:
        return BUFFERS, True
    if leaf and words[-1] == "v" and " ".join([*words[:-1], "g"]) in siblings:
        return None
    if not any(word for word in rest if not word.isdigit() and word not in ("t", "hat")):
        return _alone(whole, reason, head, tail, siblings, shapes, shapes[parts])
    # `weight_m` beside `weight`, `target_net` beside `policy_net`.
    named = [(name, equal) for name, equal in siblings.items()]
    if leaf and not tail:
        named += [
            (_plain(one[-1]), shape == shapes[parts])
            for one, shape in shapes.items()
            if _words(one[-1]) == rest
        ]
    for name, equal in named:
        other = name.split(" ")
        extra = [word for word in other if word not in rest]
        if equal and set(rest) <= set(other) and set(extra) <= _COUNTERPARTS:
            return reason, False
    return (OPTIMIZER, False) if "momentum" in marks else None


def _alone(
    whole: str,
    reason: str,
    head: tuple[str, ...],
    tail: tuple[str, ...],
    siblings: Mapping[str, bool],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    shape: tuple[int, ...],
) -> tuple[str, bool] | None:
    """Return what a part of nothing but such words says: `mu/kernel`, `target/kernel`, `m`."""
    if set(siblings) & (_LEARNED | (_ATTENTION if whole == "v" else set())):
        return None
    if whole in ("mu", "nu") and {"mu", "nu"} <= {whole, *siblings} and len(shapes) > 2:
        return reason, True
    within = shapes.get(head + tail) == shape  # kernel/m, beside kernel
    beside = any(siblings.values())
    elsewhere = reason == OPTIMIZER and any(
        other == shape and tail and one[-len(tail) :] == tail and _plain(one[0]) in _MODELS
        for one, other in shapes.items()
    )
    if reason == OPTIMIZER and not tail:
        return reason, False
    # A layer `v` or `square` stands beside other layers; a moment stands beside its parameter.
    partners = {"m", "v"} <= {whole, *siblings}
    if reason == OPTIMIZER and tail and not (within or partners or elsewhere):
        beside = beside and whole not in ("v", "square", "slot", "slots")
    return (reason, False) if within or beside or elsewhere or partners else None
