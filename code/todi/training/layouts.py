"""How a DeepSpeed engine spreads weights and moments over ranks, and how a state of one layout goes into another.

An optimizer steps flat fp32 tensors: without ZeRO each is a parameter, at stage 1 and 2 a rank's part of all parameters
of a group one after the other, at stage 3 a rank's part of each parameter of a sub-group one after the other. A state
notes which stretch of which parameter lies where in them; so every rank of another layout finds what it needs in the
files of the ranks before, and reads no more than that.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor, nn

from todi.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")
FOLDER = "deepspeed"  # of a state, where DeepSpeed's files lie


class Piece(NamedTuple):
    """A stretch of a parameter in a flat tensor of the optimizer.

    Attributes:
        start: its first number in the parameter, flattened.
        count: how many numbers it has.
        flat: which flat tensor it lies in.
        offset: where it begins there.
    """

    start: int
    count: int
    flat: int
    offset: int


class Spread(NamedTuple):
    """Over how much a run is spread.

    Attributes:
        ranks: how many there are.
        stage: of ZeRO.
    """

    ranks: int
    stage: int

    @property
    def owners(self) -> int:
        """Ranks whose files hold something of the optimizer; without ZeRO it is whole on each, and the first writes."""
        return self.ranks if self.stage else 1

    def __str__(self) -> str:
        return f"{self.ranks} {'rank' if self.ranks == 1 else 'ranks'} at ZeRO stage {self.stage}"


def pieces_of(engine: deepspeed.DeepSpeedEngine) -> dict[str, tuple[int, ...]]:
    """What lies where in this rank's flat tensors, by the parameter's name: the fields of a `Piece`, as a file has it.

    A parameter has one piece on a rank, or none.
    """
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    find = _whole if stage == 0 else _of_parameters if stage == 3 else _of_groups
    return {names[parameter]: tuple(piece) for parameter, piece in find(optimizer) if piece.count > 0}


def _whole(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, Piece]]:
    for number, parameter in enumerate(_stepped(optimizer)):
        yield parameter, Piece(0, parameter.numel(), number, 0)


def _of_groups(optimizer: Any) -> Iterator[tuple[nn.Parameter, Piece]]:
    for number, group in enumerate(optimizer.bit16_groups):
        for parameter in group:
            if parameter._hp_mapping is not None:
                ours, theirs = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
                yield parameter, Piece(ours.start, ours.numel, number, theirs.start)


def _of_parameters(optimizer: Any) -> Iterator[tuple[nn.Parameter, Piece]]:
    rank = torch.distributed.get_rank()
    for number, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()  # of each rank, that of the last ones is padded
            yield parameter, Piece(rank * size, min(size, parameter.ds_numel - rank * size), number, offset)
            offset += size


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


class SavedOptimizer:
    """The weights and moments that the ranks of a state left, in fp32, and what else DeepSpeed keeps with them.

    Files are mapped, not read: what is not asked for is not loaded. Whoever makes one says what may be unpickled.

    Args:
        path: of the state.
        spread: of the run that wrote it.

    Raises:
        InputError: it does not say what lies where, as those of earlier versions do not.
    """

    def __init__(self, path: Path, spread: Spread):
        self.path = path
        self.spread = spread
        self._load = cache(partial(torch.load, map_location="cpu", weights_only=True, mmap=True))
        self._flats = cache(self._find_flats)
        self.sources: dict[str, list[tuple[int, Piece]]] = {}  # rank and piece, by the parameter's name
        for rank in range(spread.owners):
            pieces = self._load(path / f"rank{rank}.pt").get("pieces")
            if pieces is None:
                raise InputError(f"{path} is of an earlier version, whose states do not say where each parameter lies: "
                                 f"let it go on once with {spread}, or start anew with --resume never")
            for name, piece in pieces.items():
                self.sources.setdefault(name, []).append((rank, Piece(*piece)))

    @property
    def engine(self) -> dict[str, Any]:
        """What DeepSpeed keeps of the engine, apart from the optimizer."""
        return self._load(self._file("*mp_rank_00_model_states.pt"))

    @property
    def wrapper(self) -> Mapping[str, Any]:
        """What DeepSpeed's optimizer keeps besides, as the scale of the loss; nothing without ZeRO."""
        return self._zero(0) if self.spread.stage else {}

    @property
    def groups(self) -> Sequence[Mapping[str, Any]]:
        """The settings of each group of parameters."""
        return self._inner(0)["param_groups"]

    @property
    def step(self) -> Tensor | None:
        """Updates that the optimizer has done; None before the first."""
        return next((state["step"] for state in self._inner(0)["state"].values()), None)

    def copy(self, name: str, piece: Piece, into: Mapping[str, Tensor]) -> None:
        """Fills a piece of a parameter.

        Args:
            into: flat tensors, "weight" and `MOMENTS`, of which the piece's stretch is written.

        Raises:
            InputError: there is not all of it.
        """
        found = 0
        for rank, source in self.sources.get(name, ()):
            first, end = max(piece.start, source.start), min(piece.start + piece.count, source.start + source.count)
            if first >= end:
                continue
            saved = self._flats(rank)[source.flat]
            for key, flat in into.items():
                place = slice(piece.offset + first - piece.start, piece.offset + end - piece.start)
                flat[place].copy_(saved[key].view(-1)[source.offset + first - source.start:][:end - first])
            found += end - first
        if found != piece.count:
            raise InputError(f"{self.path} has {found} of {piece.count} numbers of {name}; start anew with "
                             "--resume never")

    def _find_flats(self, rank: int) -> list[dict[str, Tensor]]:
        """The flat tensors of a rank, each with its moments, if there are any yet."""
        states = self._inner(rank)["state"]
        return [{"weight": weight, **states.get(number, {})} for number, weight in enumerate(self._weights(rank))]

    def _weights(self, rank: int) -> Sequence[Tensor]:
        if self.spread.stage:
            return self._zero(rank)["fp32_flat_groups" if self.spread.stage == 3 else "single_partition_of_fp32_groups"]
        by_number, weights = {piece.flat: name for name, [(_, piece)] in self.sources.items()}, self.engine["module"]
        return [weights[by_number[number]] for number in sorted(by_number)]

    def _inner(self, rank: int) -> Mapping[str, Any]:
        """The state of the optimizer that DeepSpeed wraps."""
        if self.spread.stage == 0:
            return self.engine["optimizer"]
        return self._zero(rank)["optimizer_state_dict" if self.spread.stage == 3 else "base_optimizer_state"]

    def _zero(self, rank: int) -> Mapping[str, Any]:
        return self._load(self._file(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))["optimizer_state_dict"]

    def _file(self, pattern: str) -> Path:
        return min((self.path / FOLDER).glob(pattern))


def take_over(saved: SavedOptimizer, engine: deepspeed.DeepSpeedEngine) -> None:
    """Puts a state of any layout into an engine of another; every rank calls it.

    Raises:
        InputError: the state lacks something of a parameter.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    with torch.no_grad():
        _fill(saved, engine)
    for name, value in saved.wrapper.items():
        if name in ("loss_scaler", "dynamic_loss_scale") and hasattr(optimizer, name):
            setattr(optimizer, name, value)
    for group, before in zip(optimizer.param_groups, saved.groups, strict=True):
        group.update({name: value for name, value in before.items() if name != "params"})
    _spread_weights(optimizer, stage)
    _restore_engine(saved.engine, engine)


def flat_tensors(engine: deepspeed.DeepSpeedEngine) -> tuple[Sequence[Tensor], torch.optim.Optimizer]:
    """What this rank's optimizer steps, in fp32, and the optimizer itself, which has their moments."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return _stepped(optimizer), optimizer
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    return flats, optimizer.optimizer


def _fill(saved: SavedOptimizer, engine: deepspeed.DeepSpeedEngine) -> None:
    """The flat tensors of this rank, and their moments; without any, the optimizer stays as new."""
    flats, inner = flat_tensors(engine)
    step = saved.step
    keys = MOMENTS if step is not None else ()
    states = [{key: torch.zeros_like(flat) for key in keys} for flat in flats]
    for name, fields in pieces_of(engine).items():
        piece = Piece(*fields)
        tensors = {"weight": flats[piece.flat].data, **states[piece.flat]}
        saved.copy(name, piece, {key: tensor.view(-1) for key, tensor in tensors.items()})
    if step is not None:
        for flat, state in zip(flats, states, strict=True):
            inner.state[flat] = {"step": step.to(flat.device, copy=True), **state}


def _spread_weights(optimizer: Any, stage: int) -> None:
    """Makes the weights that compute, on all ranks, those that the optimizer steps."""
    if stage == 3:
        # From what lies in it: DeepSpeed has no other way from the flat tensors to the parameters outside a step.
        optimizer.load_state_dict([optimizer.state_dict()] * torch.distributed.get_world_size())
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()


def _restore_engine(before: Mapping[str, Any], engine: deepspeed.DeepSpeedEngine) -> None:
    """The counters of an engine, the place in its schedule, and what a model keeps besides parameters."""
    engine.lr_scheduler.load_state_dict(before["lr_scheduler"])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, before[name])
    for name, buffer in engine.module.named_buffers():
        if name in before["module"]:
            buffer.copy_(before["module"][name])
