"""Ending an answer at a text, also when the text crosses tokens and chunks."""

from collections.abc import Sequence


class StopText:
    """Passes text on until one of `stops` appears; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.is_stopped = False
        self._held = ""

    def push(self, text: str) -> str:
        """The text that may be shown now. After a stop nothing is."""
        if self.is_stopped:
            return ""
        text = self._held + text
        # the stop that is whole first ends the answer: so the cut does not depend on where tokens end
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back for a stop that never came."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
