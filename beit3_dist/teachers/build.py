"""Teachers by their kind."""

from __future__ import annotations

from beit3_dist.teachers.beit3 import BEiT3Teacher
from beit3_dist.teachers.vision import CLIPTeacher, EfficientNetLite0, Teacher, TimmTeacher


def build_teacher(
    kind: str, grid: int, *, weights: str = "", name: str = "", quick_gelu: bool = True, head_dim: int = 64
) -> Teacher:
    """The teacher of a grid x grid map of features; the fields of `TeacherConfig`. ValueError where its file does not
    fit."""
    match kind:
        case "clip":
            return CLIPTeacher(grid, weights, quick_gelu=quick_gelu, head_dim=head_dim)
        case "timm":
            return TimmTeacher(grid, name, weights)
        case "beit3":
            return BEiT3Teacher(grid, weights)
    return EfficientNetLite0(grid)
