"""Draw an index from logits by a rule (temperature, top-k, nucleus), and insert tokens into rows."""

import jax
import jax.numpy as jnp

from ilm_jax.models import numerics
from ilm_jax.types import Rule

# --- drawing and inserting --------------------------------------------------------------------------------------------


def choose(rng_B, logits_BxN, rule: Rule):
  """Draw one index of each row by the rule; the token that crosses top_p is kept. Rows use their own keys.

  An entry's noise depends on (key, index) alone, so a longer row of closed entries draws the same index.
  """
  if rule.temperature == 0.0 or rule.top_k == 1:
    return jnp.argmax(logits_BxN, axis=-1)
  logits = restrict(logits_BxN.astype(jnp.float32) / rule.temperature, rule)
  gumbel = jax.vmap(lambda rng: jax.random.gumbel(rng, logits.shape[1:]))(rng_B)
  return jnp.argmax(jnp.where(logits > numerics.NEG_INF / 2, logits + gumbel, numerics.NEG_INF), axis=-1)


def choose_several(rng_B, logits_BxN, rule: Rule, *, count: int):
  """Draw `count` different indices of each row by the rule, one after the other without replacement.

  The first is that of `choose` with the same key: the largest sums of logits and Gumbel noise are such draws.

  Returns:
    (index_BxG, ok_BxG): not ok where the rule leaves fewer.
  """
  if rule.temperature == 0.0 or rule.top_k == 1:  # greedy, either way: the best ones
    value_BxG, index_BxG = jax.lax.top_k(logits_BxN, count)
    return index_BxG, value_BxG > numerics.NEG_INF / 2
  logits = restrict(logits_BxN.astype(jnp.float32) / rule.temperature, rule)
  gumbel = jax.vmap(lambda rng: jax.random.gumbel(rng, logits.shape[1:]))(rng_B)
  value_BxG, index_BxG = jax.lax.top_k(
    jnp.where(logits > numerics.NEG_INF / 2, logits + gumbel, numerics.NEG_INF), count
  )
  return index_BxG, value_BxG > numerics.NEG_INF / 2


def restrict(logits_BxN, rule: Rule):
  """Put numerics.NEG_INF on all but the top_k largest entries, then on what lies outside the nucleus of mass top_p."""
  size = logits_BxN.shape[-1]
  if 0 < rule.top_k < size:
    key_BxN = _ordered(logits_BxN)
    logits_BxN = jnp.where(_largest(key_BxN, jnp.sort(key_BxN, axis=-1), rule.top_k), logits_BxN, numerics.NEG_INF)
  if rule.top_p < 1.0:
    key_BxN = _ordered(logits_BxN)
    sorted_BxN = jnp.sort(key_BxN, axis=-1)  # of integers, many times faster than an argsort
    prob_BxN = jax.nn.softmax(_ordered_back(sorted_BxN)[..., ::-1], axis=-1)
    before_BxN = jnp.cumsum(prob_BxN, axis=-1) - prob_BxN  # mass of the strictly more probable ones
    count_B = jnp.maximum((before_BxN < rule.top_p).sum(axis=-1), 1)
    logits_BxN = jnp.where(_largest(key_BxN, sorted_BxN, count_B), logits_BxN, numerics.NEG_INF)
  return logits_BxN


def _largest(key_BxN, sorted_BxN, count_B):
  """Whether an entry is among the `count` largest of its row; of equal ones, the first are."""
  count_Bx1 = jnp.broadcast_to(jnp.asarray(count_B), key_BxN.shape[:-1])[..., None]
  least_Bx1 = jnp.take_along_axis(sorted_BxN, sorted_BxN.shape[-1] - count_Bx1, axis=-1)
  above_BxN, equal_BxN = key_BxN > least_Bx1, key_BxN == least_Bx1
  room_Bx1 = count_Bx1 - above_BxN.sum(axis=-1, keepdims=True)
  return above_BxN | (equal_BxN & (jnp.cumsum(equal_BxN, axis=-1) <= room_Bx1))


def _ordered(x):
  """float32 as int32 in the same order."""
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # one zero, not two
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _ordered_back(key):
  return jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)


def insert(array_BxL, gap_B, value_B, go_B):
  """Put value right of position gap in the rows with go, moving the rest up by one (the last entry falls off).

  [a b c _], gap 0, value x -> [a x b c].
  """
  index_1xL = jnp.arange(array_BxL.shape[1])[None]
  shifted = jnp.take_along_axis(array_BxL, index_1xL - (index_1xL > gap_B[:, None]), axis=1)
  inserted = jnp.where(index_1xL == gap_B[:, None] + 1, value_B[:, None].astype(array_BxL.dtype), shifted)
  return jnp.where(go_B[:, None], inserted, array_BxL)


def insert_all(array_BxL, value_BxL, go_BxL):
  """Put value_BxL[b, i] right of every position i with go, moving the rest up (what leaves the buffer is dropped).

  [a b c _ _], go at 0 and 2, values x . z -> [a x b c z].
  """
  size, go_BxL = array_BxL.shape[1], go_BxL.astype(jnp.int32)
  row_Bx1 = jnp.arange(array_BxL.shape[0])[:, None]
  to_BxL = jnp.arange(size)[None] + jnp.cumsum(go_BxL, axis=1) - go_BxL
  out_BxL = array_BxL.at[row_Bx1, to_BxL].set(array_BxL, mode='drop')
  new_BxL = jnp.where(go_BxL > 0, to_BxL + 1, size)
  return out_BxL.at[row_Bx1, new_BxL].set(value_BxL.astype(array_BxL.dtype), mode='drop')
