"""Tokenizers: here the word-level one of the planning tasks."""

from ilm_jax.types import UserError

SPECIAL = ('[PAD]', '[CLS]', '[MASK]', '[EOS]', '[BOS]', '[SEP]', '[UNK]')
PAD, CLS, MASK, EOS, BOS, SEP, UNK = range(7)


class WordTokenizer:
  """Ids of a closed list of words, after the seven special tokens."""

  def __init__(self, words):
    self.words = SPECIAL + tuple(words)
    self._ids = {word: i for i, word in enumerate(self.words) if i >= len(SPECIAL)}

  @property
  def vocab_size(self) -> int:
    return len(self.words)

  @property
  def special_ids(self) -> tuple[int, ...]:
    """Ids that a sampler never inserts."""
    return tuple(range(len(SPECIAL)))

  def encode(self, words) -> list[int]:
    """Look up a sequence of words."""
    for word in words:
      if word not in self._ids:
        known = self.words[len(SPECIAL) :]
        raise UserError(f'unknown token {word!r}: expected one of {known[0]} ... {known[-1]} ({len(known)} words)')
    return [self._ids[word] for word in words]

  def decode(self, ids) -> list[str]:
    """The words of a sequence of ids, special ones in brackets."""
    return [self.words[int(i)] for i in ids]
