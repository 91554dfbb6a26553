"""Judges: models that say how likely texts are, token by token.

    judge = judges.get('runs/arm')                 one of our own ARM runs
    judge = judges.get('hf:gpt2')                  a causal model of Hugging Face, by name or path; the extra [judge]
    judge.nll(['The dog ran home.'])               [Judged(nll, tokens, ids, cut)]

A judge's likelihood is that of the tokens of a text given the token before the first one ([BOS]); the end is left out,
as in arXiv 2505.05755. A text of more tokens than the judge was made for is cut to the first ones, and says so.
"""

import time
from typing import NamedTuple

import numpy as np
from absl import logging

from ilm_jax.runs import run_file
from ilm_jax.types import UserError

HUB = 'hf:'
SHORTEST = 32  # tokens of the shortest bucket; each is twice the one before


class Judged(NamedTuple):
  """What a judge says of a text."""

  nll: float  # in nats, of all its tokens
  tokens: int
  ids: list[int]  # the tokens
  cut: bool  # the text is longer: these are its first tokens


class Judge:
  """What all judges share: texts are sorted by length, cut, and judged in batches that are padded to few lengths."""

  name: str
  limit: int  # tokens of a text
  rows: int  # of a batch

  def encode(self, text: str) -> list[int]:
    """The tokens of a text, without a start and an end."""
    raise NotImplementedError

  def losses(self, ids_BxL: np.ndarray, tokens_B: np.ndarray) -> np.ndarray:
    """-log p of each token given those before it, anything behind a row's tokens: BxL."""
    raise NotImplementedError

  def nll(self, texts: list[str]) -> list[Judged]:
    """Judge texts; what it says of one does not depend on the others."""
    whole = [self.encode(text) for text in texts]
    rows = [ids[: self.limit] for ids in whole]
    out = [Judged(0.0, 0, [], False)] * len(texts)
    order = sorted((i for i, ids in enumerate(rows) if ids), key=lambda i: len(rows[i]))
    total, done = sum(map(len, rows)), 0
    start = said = time.monotonic()
    for first in range(0, len(order), self.rows):
      batch = order[first : first + self.rows]
      ids_BxL = np.zeros((self.rows, self.bucket(len(rows[batch[-1]]))), np.int32)
      tokens_B = np.zeros(self.rows, np.int32)
      for row, i in enumerate(batch):
        tokens_B[row] = len(rows[i])
        ids_BxL[row, : tokens_B[row]] = rows[i]
      losses_BxL = np.asarray(self.losses(ids_BxL, tokens_B), np.float64)
      for row, i in enumerate(batch):
        n = len(rows[i])
        out[i] = Judged(float(losses_BxL[row, :n].sum()), n, rows[i], len(whole[i]) > n)
        done += n
      if time.monotonic() - said > 10:
        said = time.monotonic()
        logging.info('judged %s of %s tokens, %.0f s left', f'{done:,}', f'{total:,}',
                     (total - done) * (said - start) / done)  # fmt: skip
    return out

  def bucket(self, tokens: int) -> int:
    """To how many tokens a batch is padded."""
    size = SHORTEST
    while size < tokens:
      size *= 2
    return min(size, self.limit)


class Once:
  """A judge that looks at every text once, however often it is asked about it."""

  def __init__(self, judge: Judge):
    self.judge, self.name, self.limit, self.said = judge, judge.name, judge.limit, {}

  def nll(self, texts: list[str]) -> list[Judged]:
    """Judge texts."""
    new = [text for text in dict.fromkeys(texts) if text not in self.said]
    self.said |= zip(new, self.judge.nll(new), strict=True)
    return [self.said[text] for text in texts]


# --- our own ----------------------------------------------------------------------------------------------------------


class ArmJudge(Judge):
  """A LanguageModel of family=arm: its exact likelihood, its tokenizer. [UNK] is a token like others."""

  def __init__(self, lm, *, name: str = 'arm', rows: int = 16):
    import jax

    from ilm_jax.families import arm
    from ilm_jax.models import transformer
    from ilm_jax.special_tokens import BOS, CLS, UNK

    self.name, self.rows, self.lm = name, rows, lm
    self.given = np.array([CLS, BOS], np.int32)
    self.limit = lm.sample_cfg.max_length - len(self.given)
    cfg = lm.sample_cfg._replace(closed_tokens=tuple(i for i in lm.sample_cfg.closed_tokens if i != UNK))

    @jax.jit
    def run(params, tokens_BxL, length_B):
      return arm.next_losses(transformer.Forward(lm.model_cfg, params), tokens_BxL, length_B, cfg)

    self.run = run

  @classmethod
  def load(cls, workdir) -> 'ArmJudge':
    """The weights of a run that were best on validation."""
    from ilm_jax.inference import api

    check(workdir)
    return cls(api.load(workdir), name=str(workdir))

  def encode(self, text: str) -> list[int]:
    return list(map(int, self.lm.tokenizer.encode(text)))

  def losses(self, ids_BxL, tokens_B):
    given_BxL = np.broadcast_to(self.given, (len(ids_BxL), len(self.given)))
    tokens_BxL = np.concatenate([given_BxL, ids_BxL], axis=1)
    losses_BxL = self.run(self.lm.params, tokens_BxL, tokens_B + len(self.given))
    return np.asarray(losses_BxL)[:, len(self.given) - 1 : -1]


# --- Hugging Face -----------------------------------------------------------------------------------------------------


class HuggingFaceJudge(Judge):
  """A causal model of transformers: bfloat16 on a GPU, float32 on CPU. The start is its BOS, or its EOS."""

  def __init__(self, name: str, *, rows: int = 8):
    torch, transformers = _hugging_face()
    try:
      self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, split_special_tokens=True)  # they are text
      net = transformers.AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
      reason = ' '.join(str(error).split()).split('. ')[0][:200]
      raise UserError(
        f'the judge {HUB}{name} could not be loaded from Hugging Face or a folder '
        f'({reason}): name another, or the folder of a run of family=arm'
      ) from None
    starts = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
    self.start = next((start for start in starts if start is not None), None)
    if self.start is None:
      raise UserError(f'the judge {HUB}{name} has neither a BOS nor an EOS token to start from: use another model')
    on_gpu = torch.cuda.is_available()
    self.device = 'cuda' if on_gpu else 'cpu'
    self.net = net.to(device=self.device, dtype=torch.bfloat16 if on_gpu else torch.float32).eval()
    lengths = self.tokenizer.model_max_length, getattr(net.config, 'max_position_embeddings', None)
    self.limit = min(int(length) for length in lengths if length) - 1
    self.name, self.rows, self.torch = HUB + name, rows, torch

  def encode(self, text: str) -> list[int]:
    return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

  def losses(self, ids_BxL, tokens_B):
    torch = self.torch
    mask_BxL = np.arange(ids_BxL.shape[1] + 1)[None] <= tokens_B[:, None]
    inputs_BxL = np.concatenate([np.full((len(ids_BxL), 1), self.start), ids_BxL], axis=1)
    inputs_BxL, mask_BxL, ids_BxL = (
      torch.tensor(array, device=self.device, dtype=torch.long) for array in (inputs_BxL, mask_BxL, ids_BxL)
    )
    with torch.inference_mode():
      logits_BxLxV = self.net(input_ids=inputs_BxL, attention_mask=mask_BxL).logits
      losses = [  # a row at a time: the logits in float32 take more room than the model's
        torch.nn.functional.cross_entropy(logits_LxV[:-1].float(), ids_L, reduction='none')
        for logits_LxV, ids_L in zip(logits_BxLxV, ids_BxL, strict=True)
      ]
      return torch.stack(losses).cpu().numpy()


def _hugging_face():
  try:
    import torch
    import transformers
  except ImportError:
    raise UserError(f'a judge {HUB}NAME needs transformers and torch: pip install "ilm_jax[judge]"') from None
  return torch, transformers


# --- by name ----------------------------------------------------------------------------------------------------------


def check(name) -> None:
  """Refuse a judge that there is not, before it is loaded.

  Raises:
    UserError: no run there, a run of another family or task, a package that is missing.
  """
  if str(name).startswith(HUB):
    _hugging_face()
    if not str(name).removeprefix(HUB):
      raise UserError(f'the judge {name}: expected a name or path behind {HUB}, such as {HUB}gpt2')
    return

  try:
    cfg = run_file.read_config(name)
  except UserError as error:
    raise UserError(f'the judge {error}; or {HUB}NAME, of Hugging Face') from None
  if cfg['family'] != 'arm':
    raise UserError(
      f'the judge {name} is a run of family={cfg["family"]}: expected family=arm, which gives every text its exact '
      f'likelihood, or {HUB}NAME'
    )
  if cfg['task']['name'] != 'text':
    raise UserError(f'the judge {name} is a run of the task {cfg["task"]["name"]}: expected one of texts')


def get(name) -> Judge:
  """A judge by the workdir of an ARM run, or `hf:` and the name or path of a model."""
  check(name)
  if str(name).startswith(HUB):
    return HuggingFaceJudge(str(name).removeprefix(HUB))
  return ArmJudge.load(name)
