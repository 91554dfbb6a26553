"""Build a family's SampleConfig from the `sampling` section of a config, and describe a SampleConfig in words."""

import math
import numbers

import numpy as np

from ilm_jax.types import LEAST_TEMPERATURE, Rule, UserError

RULES = ('gap', 'token', 'joint')  # settings whose value is a sampling rule (temperature, top-k, top-p)
# The sampling settings of all families; a family ignores those that its SampleConfig lacks.
KNOWN = frozenset([
  *['max_length', 'max_steps', 'min_buffer', 'force_first', 'bytes', 'two_stage', *RULES],
  *['stop_threshold', 'stop_temperature', 'gaps', 'gap_threshold', 'parallel', 'end_threshold'],
  *['order', 'length', 'score_draws'],
])  # fmt: skip
WHOLE = ('max_length', 'max_steps', 'min_buffer', 'gaps', 'score_draws', 'top_k')  # settings that are whole numbers
SWITCHES = ('force_first', 'bytes', 'two_stage', 'parallel')  # settings that are True or False
OPTIONAL = ('max_steps', 'stop_threshold', 'end_threshold')  # settings that may be None
FLOAT32_MAX = float(np.finfo(np.float32).max)  # logits are divided by temperatures in float32
ALLOWED = {  # name of a sampling setting -> (test whether a number is allowed, the allowed numbers in words)
  'max_length': (lambda x: x >= 3, 'at least 3'),
  'max_steps': (lambda x: x >= 0, 'at least 0'),
  'min_buffer': (lambda x: x >= 1, 'at least 1'),
  'stop_temperature': (lambda x: 0 < x <= FLOAT32_MAX, 'a number above 0, at most 3.4e38'),
  'stop_threshold': (lambda x: 0 <= x <= 1, 'a probability, or 0 to stop at random with probability p(stop)'),
  'end_threshold': (lambda x: 0 <= x < 1, 'a probability below 1, or 0 to end a gap when [EOS] is most probable'),
  'gaps': (lambda x: x >= 0, 'a number of gaps, or 0 for all gaps'),
  'gap_threshold': (lambda x: 0 <= x <= 1, 'a fraction from 0 to 1'),
  'score_draws': (lambda x: x >= 2 and x % 2 == 0, 'an even number of at least 2'),
  'temperature': (lambda x: 0 <= x <= FLOAT32_MAX, 'a number of at least 0 (0: greedy), at most 3.4e38'),
  'top_k': (lambda x: x >= 0, 'at least 0 (0: no limit)'),
  'top_p': (lambda x: 0 < x <= 1, 'a probability above 0 (1: no limit)'),
}


def check(settings: dict, prefix: str) -> None:
  """Raise UserError unless each setting in ALLOWED is a number in its range, and each one in SWITCHES a boolean."""
  for name in SWITCHES:
    if name in settings and not isinstance(settings[name], (bool, np.bool_)):
      raise UserError(f'{prefix}{name}={settings[name]!r}: expected True or False')
  for name, (allowed, expected) in ALLOWED.items():
    value = settings.get(name)
    if value is None and (name in OPTIONAL or name not in settings):
      continue
    if not is_number(value, whole=name in WHOLE):
      word = 'a whole number below 2**31' if name in WHOLE else 'a finite number'
      raise UserError(f'{prefix}{name}={value!r}: expected {word}')
    if not allowed(float(value)):
      raise UserError(f'{prefix}{name}={value}: expected {expected}')


def is_number(value, *, whole: bool) -> bool:
  """Return whether a value is a finite number or, with `whole`, an integer below 2**31; booleans are not numbers."""
  if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
    return False
  try:
    return int(value) < 2**31 if whole else math.isfinite(float(value))
  except OverflowError:  # an integer or a fraction above the largest float
    return False


def sample_config(cls, sampling, **others):
  """Build a family's SampleConfig from sampling settings; raise UserError for unknown names and values out of range.

  Settings that are not fields of `cls`, the SampleConfig, are ignored. Those in RULES are a Rule, or a dict of its
  fields. `others` are fields that users cannot set, because the model or the task determines them.
  """
  settings = dict(sampling)
  for name in sorted(set(settings) - KNOWN - set(cls._fields)):
    expected = ', '.join(sorted(KNOWN & set(cls._fields)))
    raise UserError(f'unknown sampling setting {name!r}: expected one of {expected}')
  if reserved := sorted(set(settings) & set(others)):
    raise UserError(f'sampling.{reserved[0]} cannot be set, because the model or the task determines it: remove it')
  check(settings, 'sampling.')
  if settings.pop('two_stage', settings.get('joint') is None):
    settings['joint'] = None
  for name in RULES:
    if name in settings and not (name == 'joint' and settings[name] is None):
      settings[name] = make_rule(settings[name], f'sampling.{name}')
  return cls(**{name: value for name, value in settings.items() if name in cls._fields}, **others)


def make_rule(value, name: str) -> Rule:
  """Return a sampling Rule from a Rule or a dict of its fields; raise UserError if it is none, or a field is wrong."""
  if not isinstance(value, Rule) and not hasattr(value, 'keys'):  # a ConfigDict has keys, but is not a dict
    raise UserError(f"{name}={value!r}: expected a dict of {', '.join(Rule._fields)}, such as {{'temperature': 0.7}}")
  fields = value._asdict() if isinstance(value, Rule) else dict(value)
  if unknown := sorted(set(fields) - set(Rule._fields)):
    raise UserError(f'unknown setting {name}.{unknown[0]}: expected one of {", ".join(Rule._fields)}')
  check(fields, f'{name}.')
  rule = Rule(**fields)
  return rule._replace(temperature=0.0) if rule.temperature < LEAST_TEMPERATURE else rule


def never_generated(cfg) -> tuple[int, ...]:
  """Return the ids of tokens never sampled: special tokens and, unless `cfg.bytes`, tokens for single UTF-8 bytes."""
  return cfg.suppressed_tokens + (() if cfg.bytes else cfg.byte_ids)


def describe(cfg) -> str:
  """Describe in one line every setting of a SampleConfig that affects the samples."""

  def words(value):
    if not isinstance(value, Rule):
      return 'sampled' if value is None else str(value)
    if value.greedy:
      return 'greedy'
    rest = f', top {value.top_k}' if value.top_k else ''
    return f'temperature {value.temperature}{rest}' + (f', nucleus {value.top_p}' if value.top_p < 1 else '')

  hidden = {'suppressed_tokens', 'byte_ids', 'score_draws', 'min_buffer', 'compute', 'vocab_chunk'}
  if getattr(cfg, 'joint', None) is not None:
    hidden |= {'gap', 'token'}
  shown_if_none = ('stop_threshold',)  # None means that stops are sampled; in other settings, None means "not used"
  return '; '.join(
    f'{name} {words(value)}'
    for name, value in cfg._asdict().items()
    if name not in hidden and value is not False and (value is not None or name in shown_if_none)
  )
