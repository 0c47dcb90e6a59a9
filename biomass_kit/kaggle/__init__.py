"""What runs on Kaggle, how it is packed, and the proof that it works; these names are what uploaded notebooks import."""
from ..data.progress import print_progress
from ..inference.issues import summary_lines
from .inference import check_reference, find_inputs, predict_competition, predict_inputs, show_predictions

__all__ = ["check_reference", "find_inputs", "predict_competition", "predict_inputs", "print_progress", "show_predictions",
           "summary_lines"]
