"""Which round was best so far, and whether to go on.

A round is judged by the loss on the rows that the sites keep back, where they keep any; otherwise
by the score on the common test rows, where there are any (then that score is optimistic, as it
chose the round). Lower losses and higher scores are better; of equal rounds the later one, which
has trained longer. A score of 0 makes no round the best.
"""

from dataclasses import dataclass, replace
from typing import Any

from fedfora.reporting.wording import main_scores


@dataclass(frozen=True)
class Selection:
    """The best round so far.

    Args:
        best_round: Its number, counted from 1; 0 where none was judged.
        best_value: Its loss or score.
        waited: Rounds judged since the value was first reached, none of them better.
    """

    best_round: int = 0
    best_value: float = 0.0
    waited: int = 0

    def judged(self, round_number: int, value: float, *, lower_is_better: bool) -> "Selection":
        """Return the selection after another round was judged.

        An equal round takes the place of the best one, but patience still runs: it brought nothing.
        """
        better = value < self.best_value if lower_is_better else value > self.best_value
        if self.best_round == 0:
            nothing_right = value == 0 and not lower_is_better
            return self if nothing_right else Selection(round_number, value)
        if better:
            return Selection(round_number, value)
        best_round = round_number if value == self.best_value else self.best_round
        return replace(self, best_round=best_round, waited=self.waited + 1)

    def is_over(self, patience: int | None) -> bool:
        """Return whether as many rounds in a row as `patience` brought nothing."""
        return patience is not None and self.waited >= patience


def judging_score(scores: dict[str, Any]) -> float | None:
    """Return the score that judges a round on test rows; None where nothing was scored."""
    names = main_scores(scores)
    return float(scores[names[0]]) if names else None
