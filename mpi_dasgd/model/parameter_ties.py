"""Parameters that share memory: they must go on to share it, and no others may begin to."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mpi_dasgd.errors import UserError
from mpi_dasgd.model.flat_memory import group_overlapping
from mpi_dasgd.model.parameter_layout import Placement, Segment

__all__ = ["require_same_ties"]


def require_same_ties(
    segments: Sequence[Segment], storages: Sequence[int], moved: Collection[int]
) -> None:
    """Refuse parameters that share memory as their segments do not say.

    Args:
        segments: the segments; their parameters are counted through.
        storages: storage of each parameter.
        moved: the parameters that are no longer where they were.

    Raises:
        UserError: two share memory that had memory of their own, or the reverse.
    """
    members = [(segment, p) for segment in segments for p in segment.placements]
    moved = set(moved)
    touched = {storages[index] for index in moved}
    by_storage: dict[int, list[int]] = {}
    for index, storage in enumerate(storages):
        if storage in touched:
            by_storage.setdefault(storage, []).append(index)
    for indices in by_storage.values():
        if len(indices) == 1:
            continue
        for group in group_overlapping([members[index][1].parameter for index in indices]):
            first_segment, first = members[indices[group[0]]]
            for position in group[1:]:
                segment, placement = members[indices[position]]
                if segment is not first_segment or _distance(first, placement) != 0:
                    raise UserError(
                        f"model: parameters {first.name} and {placement.name} share memory now, "
                        "and did not, or not in this way, when the model was made decentralized; "
                        "tie them before"
                    )
    for index in moved:
        segment, placement = members[index]
        for other in segment.placements:
            if other is not placement and _distance(other, placement) != 0:
                raise UserError(
                    f"model: parameters {other.name} and {placement.name} shared memory when the "
                    "model was made decentralized, and no longer do; assign to them in place, as "
                    "in p.copy_(value), or convert the model before"
                )


def _distance(a: Placement, b: Placement) -> int:
    """Return the bytes by which `b` is elsewhere relative to `a` than their segment says."""
    p, q = a.parameter, b.parameter
    return q.data_ptr() - p.data_ptr() - (b.offset * q.itemsize - a.offset * p.itemsize)
