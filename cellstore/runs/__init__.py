"""What was done, by which recipe, and what is left to do."""

from .jobs import JobsResult, Outcome, Task, todo_count, work_through
from .ledger import RunHandle, attach, keep_file, running
from .lookup import find_image, find_recipe, find_run, find_split, run_in
from .recipes import RecipeSpec, fingerprint, register
from .selection import images_of, segmented, selection_counts
from .workspace import Workspace, create_workspace, open_workspace

__all__ = [
    "JobsResult",
    "Outcome",
    "RecipeSpec",
    "RunHandle",
    "Task",
    "Workspace",
    "attach",
    "create_workspace",
    "find_image",
    "find_recipe",
    "find_run",
    "find_split",
    "fingerprint",
    "images_of",
    "keep_file",
    "open_workspace",
    "register",
    "run_in",
    "running",
    "segmented",
    "selection_counts",
    "todo_count",
    "work_through",
]
