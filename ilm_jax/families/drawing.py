"""Draw indices from logits under a sampling rule (temperature, top-k, nucleus), and insert tokens into rows."""

import jax
import jax.numpy as jnp

from ilm_jax.models import numerics, vocabulary
from ilm_jax.types import Outputs, Rule


def choose(rng_B, logits_BxN, rule: Rule):
  """Draw one index per row from the logits under a sampling rule, with the row's own RNG key.

  The noise added to an entry depends only on the key and the entry's index, so appending entries of logit NEG_INF to a
  row does not change its draw. Nucleus sampling includes the entry that crosses top_p.
  """
  score_BxN = logits_BxN if rule.greedy else _perturbed(rng_B, logits_BxN, rule)
  return jnp.argmax(score_BxN, axis=-1).astype(jnp.int32)


def choose_several(rng_B, logits_BxN, rule: Rule, *, count: int):
  """Draw `count` different indices per row from the logits under a sampling rule (temperature, top-k, top-p).

  The `count` largest sums of logit and Gumbel noise are a draw without replacement (the Gumbel top-k trick), so the
  first index equals that of `choose` with the same key. Returns (index_BxG, ok_BxG) in the order of the draws; ok is
  false once all entries that the rule allows in a row have been drawn.
  """
  score_BxN = logits_BxN if rule.greedy else _perturbed(rng_B, logits_BxN, rule)
  value_BxG, index_BxG = jax.lax.top_k(score_BxN, count)
  return index_BxG, value_BxG > numerics.NEG_INF / 2


def draw_token(rng_B, outputs: Outputs, gap_B, bias_V, rule: Rule, *, compute: str):
  """Draw a token for the gap to the right of position gap_B in each row.

  Returns (token_B, logit_B); the logit is that before temperature, top-k and top-p are applied.
  """
  hidden_BxD = jnp.take_along_axis(outputs.hidden_BxLxD, gap_B[:, None, None], axis=1)[:, 0]
  logits_BxV = vocabulary.vocab_logits(hidden_BxD, outputs.unembed_VxD, bias_V, compute=compute)
  token_B = choose(rng_B, logits_BxV, rule)
  return token_B, jnp.take_along_axis(logits_BxV, token_B[:, None], axis=1)[:, 0]


def _perturbed(rng_B, logits_BxN, rule: Rule):
  """Apply the rule (temperature, top-k, top-p) to the logits and add Gumbel noise; excluded entries become NEG_INF."""
  logits_BxN = logits_BxN.astype(jnp.float32)
  allowed_BxN = logits_BxN > numerics.NEG_INF / 2  # test before dividing by the temperature, which changes NEG_INF
  logits = restrict(jnp.where(allowed_BxN, logits_BxN / rule.temperature, numerics.NEG_INF), rule)
  gumbel = jax.vmap(lambda rng: jax.random.gumbel(rng, logits.shape[1:], jnp.float32))(rng_B)
  return jnp.where(logits > numerics.NEG_INF / 2, logits + gumbel, numerics.NEG_INF)


def restrict(logits_BxN, rule: Rule):
  """Set all but the top_k largest logits to NEG_INF, then all outside the nucleus: the largest ones up to top_p."""
  size = logits_BxN.shape[-1]
  if 0 < rule.top_k < size:
    key_BxN = _sort_key(logits_BxN)
    logits_BxN = jnp.where(_largest(key_BxN, jnp.sort(key_BxN, axis=-1), rule.top_k), logits_BxN, numerics.NEG_INF)
  if rule.top_p < 1.0:
    key_BxN = _sort_key(logits_BxN)
    sorted_BxN = jnp.sort(key_BxN, axis=-1)  # sorting integers is many times faster than an argsort of floats
    prob_BxN = jax.nn.softmax(_from_sort_key(sorted_BxN)[..., ::-1], axis=-1)
    before_BxN = jnp.cumsum(prob_BxN, axis=-1) - prob_BxN  # total probability of the entries sorted before each entry
    count_B = jnp.maximum((before_BxN < rule.top_p).sum(axis=-1), 1)
    logits_BxN = jnp.where(_largest(key_BxN, sorted_BxN, count_B), logits_BxN, numerics.NEG_INF)
  return logits_BxN


def _largest(key_BxN, sorted_BxN, count_B):
  """Return a mask of the `count_B` largest entries of each row; among equal entries, the first are selected."""
  count_Bx1 = jnp.broadcast_to(jnp.asarray(count_B), key_BxN.shape[:-1])[..., None]
  least_Bx1 = jnp.take_along_axis(sorted_BxN, sorted_BxN.shape[-1] - count_Bx1, axis=-1)
  above_BxN, equal_BxN = key_BxN > least_Bx1, key_BxN == least_Bx1
  room_Bx1 = count_Bx1 - above_BxN.sum(axis=-1, keepdims=True)
  return above_BxN | (equal_BxN & (jnp.cumsum(equal_BxN, axis=-1) <= room_Bx1))


def _sort_key(x):
  """Map float32 to int32 keys that sort in the same order as the floats."""
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0.0 and 0.0 get the same key
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _from_sort_key(key):
  """Map the int32 keys of `_sort_key` back to float32."""
  return jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)


def insert(array_BxL, gap_B, value_B, go_B):
  """Insert value_B right of position gap_B in rows where go_B is true; later entries move right, the last is dropped.

  Example: [a b c _], gap 0, value x -> [a x b c].
  """
  index_1xL = jnp.arange(array_BxL.shape[1])[None]
  shifted = jnp.take_along_axis(array_BxL, index_1xL - (index_1xL > gap_B[:, None]), axis=1)
  inserted = jnp.where(index_1xL == gap_B[:, None] + 1, value_B[:, None].astype(array_BxL.dtype), shifted)
  return jnp.where(go_B[:, None], inserted, array_BxL)


def insert_all(array_BxL, value_BxL, go_BxL):
  """Insert value_BxL[b, i] right of each position i where go_BxL is true; entries beyond the buffer's end are dropped.

  Example: [a b c _ _], go_BxL true at 0 and 2, values [x . z . .] -> [a x b c z].
  """
  size, go_BxL = array_BxL.shape[1], go_BxL.astype(jnp.int32)
  row_Bx1 = jnp.arange(array_BxL.shape[0])[:, None]
  to_BxL = jnp.arange(size)[None] + jnp.cumsum(go_BxL, axis=1) - go_BxL
  out_BxL = array_BxL.at[row_Bx1, to_BxL].set(array_BxL, mode='drop')
  new_BxL = jnp.where(go_BxL > 0, to_BxL + 1, size)
  return out_BxL.at[row_Bx1, new_BxL].set(value_BxL.astype(array_BxL.dtype), mode='drop')
