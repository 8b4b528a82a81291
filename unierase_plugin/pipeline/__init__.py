"""A whole run: reads the requests, judges the model, changes it by a method, judges it again, writes the folder.

Every phase that takes long is kept when it ends, so a run that was killed continues where it stopped. Token and
statistics are in the user's cache, since other runs use them too. Answers, values and the edit are beside the output
folder.
"""

from .api import change, corpus_moment, unlearn

__all__ = ["change", "corpus_moment", "unlearn"]
