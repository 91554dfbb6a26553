"""Progress messages of long evaluations, with the estimated time that remains."""

import time

from absl import logging

SECONDS_BETWEEN_LOGS = 10


class Progress:
  """Logs how many of `total` items are done, at most every ten seconds; `what` starts the message."""

  def __init__(self, what: str, total: int):
    self.what, self.total = what, total
    self.start = self.last = time.monotonic()

  def update(self, done: int) -> None:
    """Log the number of finished items, the rate and the remaining time, unless a message was logged recently."""
    if done and time.monotonic() - self.last > SECONDS_BETWEEN_LOGS:
      self.last = time.monotonic()
      rate = done / (self.last - self.start)
      left = (self.total - done) / rate
      logging.info('%s: %s of %s, %.0f per second, %.0f s left', self.what, f'{done:,}', f'{self.total:,}', rate, left)
