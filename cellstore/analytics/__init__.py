"""Questions about a store, answered in SQL."""

from .guard import Limits
from .questions import Questions, open_questions
from .views import View, views

__all__ = ["Limits", "Questions", "View", "open_questions", "views"]
