"""What was done, by which recipe, and what is left to do."""

from .execution import Forecast, JobsResult, Part, Tallies, Tally, execute, execute_together
from .jobs import Outcome, Progressed, Task, progressed
from .ledger import (
    RunHandle,
    attach,
    check_still_ours,
    files_of,
    forget_files,
    keep_file,
    running,
)
from .lookup import find_recipe, find_run, find_split, run_in
from .places import find_image, find_well
from .recipes import RecipeSpec, fingerprint, register
from .selection import first_of, images_of, segmented
from .work import Share, Work, work_through
from .workers import Step
from .workspace import Workspace, create_workspace, open_workspace

__all__ = [
    "Forecast",
    "JobsResult",
    "Outcome",
    "Part",
    "Progressed",
    "RecipeSpec",
    "RunHandle",
    "Share",
    "Step",
    "Tallies",
    "Tally",
    "Task",
    "Work",
    "Workspace",
    "attach",
    "check_still_ours",
    "create_workspace",
    "execute",
    "execute_together",
    "files_of",
    "find_image",
    "find_recipe",
    "find_run",
    "find_split",
    "find_well",
    "fingerprint",
    "first_of",
    "forget_files",
    "images_of",
    "keep_file",
    "open_workspace",
    "progressed",
    "register",
    "run_in",
    "running",
    "segmented",
    "work_through",
]
