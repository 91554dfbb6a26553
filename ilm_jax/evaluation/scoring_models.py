"""Scoring models: language models that give the negative log-likelihood (NLL) of texts, for generative perplexity.

    model = scoring_models.get('runs/arm')   # an ARM run of this project, by its workdir
    model = scoring_models.get('hf:gpt2')    # a causal Hugging Face model, by name or path
    model.nll(['The dog ran home.'])         # [TextNLL(nll=..., ids=[...], truncated=False)]

The NLL of a text is the sum over its tokens; the first token is predicted from a start token ([BOS]). As in
arXiv 2505.05755, no end token is scored. Texts longer than the model's context are truncated to their first tokens.
"""

import os
from typing import NamedTuple

import numpy as np

from ilm_jax import paths
from ilm_jax.evaluation.progress import Progress
from ilm_jax.runs import run_file
from ilm_jax.types import UserError

HF_PREFIX = 'hf:'  # `hf:NAME` is a Hugging Face model; any other name is the workdir of a run
MIN_PADDED_LENGTH = 32  # batches are padded to this number of tokens times a power of two


class TextNLL(NamedTuple):
  """The negative log-likelihood of a text under a scoring model."""

  nll: float  # sum of -log p over the scored tokens, in nats
  ids: list[int]  # the scored tokens, in the scoring model's vocabulary
  truncated: bool  # True if the text has more tokens than the model can score

  @property
  def num_tokens(self) -> int:
    return len(self.ids)


class ScoringModel:
  """Base class of scoring models: sorts texts by length, scores them in padded batches and caches the results.

  Texts are truncated to their first `max_tokens` tokens. A subclass defines `encode(text)`, which returns the token ids
  without start and end tokens, and `token_nll(ids_BxL, length_B)`, which returns -log p of each token given the
  preceding tokens, BxL; values beyond a row's length are arbitrary.
  """

  def __init__(self, name: str, max_tokens: int, batch_size: int):
    self.name, self.max_tokens, self.batch_size = name, max_tokens, batch_size
    self.cache: dict[str, TextNLL] = {}

  def nll(self, texts: list[str]) -> list[TextNLL]:
    """Return the NLL of each text, in the same order; the NLL of a text does not depend on the other texts."""
    encoded = {text: self.encode(text) for text in dict.fromkeys(texts) if text not in self.cache}
    rows = sorted(((text, ids[: self.max_tokens]) for text, ids in encoded.items()), key=lambda row: len(row[1]))
    progress, done = Progress('scored tokens', sum(len(ids) for _, ids in rows)), 0
    for first in range(0, len(rows), self.batch_size):
      batch = rows[first : first + self.batch_size]
      padded_length = max(MIN_PADDED_LENGTH, 1 << (len(batch[-1][1]) - 1).bit_length())
      ids_BxL = np.zeros((self.batch_size, min(padded_length, self.max_tokens)), np.int32)
      length_B = np.zeros(self.batch_size, np.int32)
      for row, (_, ids) in enumerate(batch):
        ids_BxL[row, : len(ids)], length_B[row] = ids, len(ids)
      nll_BxL = np.asarray(self.token_nll(ids_BxL, length_B), np.float64)
      for nll_L, (text, ids) in zip(nll_BxL, batch, strict=False):  # the batch may have padding rows
        if not np.isfinite(nll := float(nll_L[: len(ids)].sum())):
          problem = f'the negative log-likelihood {nll} to the text {text[:60]!r}'
          raise UserError(f'the scoring model {self.name} gives {problem}: expected finite weights')
        self.cache[text] = TextNLL(nll, ids, len(encoded[text]) > len(ids))
      done += int(length_B.sum())
      progress.update(done)
    return [self.cache[text] for text in texts]


class ArmScoringModel(ScoringModel):
  """Scores texts with an autoregressive model of this project, under its own tokenizer; [UNK] tokens are scored too."""

  def __init__(self, lm, *, name: str = 'arm', batch_size: int = 16):
    import jax

    from ilm_jax.families import arm
    from ilm_jax.models import transformer
    from ilm_jax.special_tokens import BOS, CLS, UNK

    self.lm, self.prefix = lm, np.array([CLS, BOS], np.int32)
    super().__init__(name, lm.sample_cfg.max_length - len(self.prefix), batch_size)
    cfg = lm.sample_cfg._replace(suppressed_tokens=tuple(i for i in lm.sample_cfg.suppressed_tokens if i != UNK))
    self.next_losses = jax.jit(
      lambda params, *rows: arm.next_losses(transformer.Forward(lm.model_cfg, params), *rows, cfg)
    )

  def encode(self, text: str) -> list[int]:
    return list(map(int, self.lm.tokenizer.encode(text)))

  def token_nll(self, ids_BxL, length_B):
    prefix_BxL = np.broadcast_to(self.prefix, (len(ids_BxL), len(self.prefix)))
    tokens_BxL = np.concatenate([prefix_BxL, ids_BxL], axis=1)
    nll_BxL = self.next_losses(self.lm.params, tokens_BxL, length_B + len(self.prefix))
    return np.asarray(nll_BxL)[:, len(self.prefix) - 1 : -1]


class HuggingFaceScoringModel(ScoringModel):
  """Scores texts with a causal Hugging Face model, in bfloat16 on a GPU and float32 on a CPU.

  The start token is the tokenizer's BOS, or its EOS if it has no BOS (GPT-2).
  """

  def __init__(self, name: str, *, batch_size: int = 8):
    import torch
    import transformers

    try:
      # split_special_tokens: the characters '</s>' in a text are scored as plain text, not as an end token
      self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, split_special_tokens=True)
      net = transformers.AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
      reason = ' '.join(str(error).split()).split('. ')[0][:200]
      problem = f'could not be loaded from Hugging Face or a local folder ({reason})'
      advice = 'name another model, or the workdir of a run of family=arm'
      raise UserError(f'the scoring model {HF_PREFIX}{name} {problem}: {advice}') from None
    start_tokens = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
    self.start = next((token for token in start_tokens if token is not None), None)
    if self.start is None:
      problem = 'has neither a BOS nor an EOS token to start from'
      raise UserError(f'the scoring model {HF_PREFIX}{name} {problem}: use another model')
    self.device, dtype = ('cuda', torch.bfloat16) if torch.cuda.is_available() else ('cpu', torch.float32)
    self.net = net.to(device=self.device, dtype=dtype).eval()
    limits = self.tokenizer.model_max_length, getattr(net.config, 'max_position_embeddings', None)
    max_tokens = min(int(limit) for limit in limits if limit) - 1  # the start token needs one of the positions
    super().__init__(HF_PREFIX + name, max_tokens, batch_size)
    self.torch = torch

  def encode(self, text: str) -> list[int]:
    return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

  def token_nll(self, ids_BxL, length_B):
    torch = self.torch
    mask_BxL = np.arange(ids_BxL.shape[1] + 1)[None] <= length_B[:, None]
    inputs_BxL = np.concatenate([np.full((len(ids_BxL), 1), self.start), ids_BxL], axis=1)
    arrays = (torch.tensor(x, device=self.device, dtype=torch.long) for x in (inputs_BxL, mask_BxL, ids_BxL))
    inputs_BxL, mask_BxL, ids_BxL = arrays
    with torch.inference_mode():
      logits_BxLxV = self.net(input_ids=inputs_BxL, attention_mask=mask_BxL).logits
      nll = [  # one row at a time: float32 logits of a whole batch can need more memory than the model
        torch.nn.functional.cross_entropy(logits_LxV[:-1].float(), ids_L, reduction='none')
        for logits_LxV, ids_L in zip(logits_BxLxV, ids_BxL, strict=True)
      ]
      return torch.stack(nll).cpu().numpy()


def check(name, setting: str = 'eval.perplexity_model') -> None:
  """Raise UserError if a scoring model cannot be used, as far as this can be told without loading the model."""
  name = str(name)
  if name.startswith(HF_PREFIX):
    try:
      import torch  # noqa: F401
      import transformers  # noqa: F401
    except ImportError:
      needed = 'needs torch and transformers: pip install "ilm_jax[perplexity]"'
      raise UserError(f'a scoring model {HF_PREFIX}NAME {needed}') from None
    if name == HF_PREFIX:
      raise UserError(f'the scoring model {name}: expected a model name or path after {HF_PREFIX}, such as hf:gpt2')
    return
  folder = paths.resolve(name, setting)
  try:
    cfg = run_file.read_config(folder)
  except UserError as error:
    raise UserError(f'the scoring model {error}; for a Hugging Face model, write {HF_PREFIX}NAME') from None
  for setting, value, expected in (('family', cfg['family'], 'arm'), ('task.name', cfg['task']['name'], 'text')):
    if value != expected:
      needed = f'family=arm, which has exact likelihoods, and task.name=text, or {HF_PREFIX}NAME'
      raise UserError(f'the scoring model {name} is a run of {setting}={value}: expected {needed}')


def get(name, setting: str = 'eval.perplexity_model') -> ScoringModel:
  """Load a scoring model: the workdir of an ARM run, or `hf:` and the name or path of a Hugging Face model."""
  check(name, setting)
  if str(name).startswith(HF_PREFIX):
    return HuggingFaceScoringModel(os.path.expanduser(str(name).removeprefix(HF_PREFIX)))
  from ilm_jax.inference import api

  return ArmScoringModel(api.load(paths.resolve(name, setting)), name=str(name))
