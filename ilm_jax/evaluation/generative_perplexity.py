"""Score generated texts with another language model: generative perplexity, entropy, diversity, infilling quality.

    ilm-jax perplexity --model=runs/arm --samples=answers.jsonl [--out=perplexity.json]
    ilm-jax perplexity --model=hf:gpt2 --samples=answers.jsonl --reference=CORPUS

--samples is a file written by `ilm-jax generate`: one JSON object with "text" per line. Infilled texts also have
"spans" and "fillings", and "truth", the true text, if their requests came from `ilm-jax infill-sets`. Otherwise
--requests names the file of infill requests, which are matched to the samples by "id".

--model is the workdir of an ARM run, or hf:NAME for a causal Hugging Face model, by name or path (pip install
"ilm_jax[perplexity]"). Texts longer than the model's context are truncated to their first tokens. The output counts
truncated texts and texts without tokens. The NLL change of infilled texts excludes those that are truncated or have no
tokens, or whose reference text does. ilm_jax/evaluation/text_statistics.py defines the statistics.
"""

import json

from absl import flags

from ilm_jax.console import command, define_seed, quiet
from ilm_jax.evaluation import output, scoring_models, text_statistics
from ilm_jax.evaluation.infill_sets import define_corpus_flags
from ilm_jax.evaluation.samples import Sample, add_requests, read_references, read_samples
from ilm_jax.types import UserError


def define(values: flags.FlagValues) -> None:
  """Define the flags of `ilm-jax perplexity`."""
  flags.DEFINE_string('model', None, 'Scoring model: the workdir of an ARM run, or hf:NAME.', flag_values=values)
  flags.DEFINE_alias('judge', 'model', flag_values=values)  # --judge is the former name of --model
  flags.DEFINE_string('samples', None, 'JSONL file of samples, written by `ilm-jax generate`.', flag_values=values)
  with_truth = 'JSONL file of infill requests with the true texts ("truth"), if the samples lack them.'
  flags.DEFINE_string('requests', None, with_truth, flag_values=values)
  texts = 'Real texts to score for comparison: a *.jsonl file, or a corpus (one document is drawn per sample).'
  flags.DEFINE_string('reference', None, texts, flag_values=values)
  define_corpus_flags(values, 'test')
  flags.DEFINE_string('out', None, 'JSON file to write the results to.', flag_values=values)
  define_seed(values, 'Seed of the bootstrap and of the choice of reference documents.')


def infill_statistics(model, samples: list[Sample], *, seed: int = 0) -> dict | None:
  """Compute the statistics of the infilled texts among the samples; return None if there are none.

  The result has counts (`answers`, `requests`, `left_out_truth`, `left_out_input`) and Estimates (`change_truth`,
  `change_input`, `exact_match`, `filling_match`), without those that need true texts or fillings that are missing.
  """
  infilled = [sample for sample in samples if sample.parts is not None]
  if not infilled:
    return None
  ids, truths = [sample.id for sample in infilled], [sample.truth for sample in infilled]
  references = {'truth': truths, 'input': [text_statistics.join_parts(sample.parts) for sample in infilled]}
  if None in truths:
    if set(truths) != {None}:
      one = ids[truths.index(None)]
      raise UserError(f'the sample with id {one!r} has no true text, but others have one: add --requests=FILE')
    del references['truth']
  scored = model.nll([sample.text for sample in infilled])
  out = {'answers': len(infilled), 'requests': len(set(ids))}
  for name, texts in references.items():
    result = text_statistics.change(ids, scored, model.nll(texts), seed=seed)
    out |= {f'change_{name}': result['change'], f'left_out_{name}': result['left_out']}
  true_fillings = [sample.true_fillings for sample in infilled]
  if all(true_fillings):
    out |= text_statistics.matches(ids, [sample.fillings for sample in infilled], true_fillings)
  return out


def score_samples(model, samples: list[Sample], references: list[str], *, seed: int = 0) -> dict:
  """Compute all statistics of generated texts (samples) and, if there are any, of real texts (references).

  The result has the keys 'samples' and 'notes' (lines to print); also 'reference' and 'mauve' if there are reference
  texts, and 'infilling' if there are infilled texts. `seed` is the seed of the bootstrap.
  """
  texts, notes = [sample.text for sample in samples], []
  out = {'samples': text_statistics.describe(texts, model.nll(texts), seed=seed)}
  if references:
    out['reference'] = text_statistics.describe(references, model.nll(references), seed=seed)
    out['mauve'], note = text_statistics.mauve(texts, references)
    notes += [note] if note else []
  if infilling := infill_statistics(model, samples, seed=seed):
    out['infilling'] = infilling
    for name, reference in (('truth', 'true text'), ('input', 'text without fillings')):
      if left_out := infilling.get(f'left_out_{name}'):
        notes.append(
          f'infilled texts: {left_out} of {infilling["answers"]} are left out of the NLL change against the '
          f'{reference}, because one of the two texts was truncated or has no tokens'
        )
  for name in ['samples', 'reference'] if references else ['samples']:
    notes += text_statistics.warnings(out[name], name, model)
  return {**out, 'notes': notes}


def format_result(result: dict) -> str:
  """Format the result of `score_samples` for the terminal."""
  columns = {name: result[name] for name in ('samples', 'reference') if name in result}
  lines = [text_statistics.table(columns)]
  if result.get('mauve') is not None:
    lines.append(f'MAUVE {result["mauve"]:.4f}')
  if 'infilling' in result:
    lines += ['', text_statistics.table({'infilling': result['infilling']})]
  return '\n'.join([*lines, '', f'In parentheses: {text_statistics.METHOD}.', *result['notes']])


def run(values) -> int:
  """Score the samples in --samples, print the statistics and write them to --out; return the exit code."""
  if not values.model:
    raise UserError('--model is missing: expected the workdir of an ARM run, or hf:NAME for a Hugging Face model')
  if not values.samples:
    raise UserError('--samples is missing: expected a JSONL file that `ilm-jax generate` wrote')
  inputs = [(f'--{name}', values[name].value) for name in ('samples', 'requests', 'reference')]
  out = output.check(values.out, inputs) if values.out else None
  samples = read_samples(values.samples)
  if values.requests:
    samples = add_requests(samples, values.requests)
  quiet()
  scoring_models.check(values.model, '--model')
  references = read_references(values, len(samples)) if values.reference else []
  model = scoring_models.get(values.model, '--model')
  result = score_samples(model, samples, references, seed=values.seed)
  settings = {name: values[name].value for name in ('samples', 'requests', 'reference', 'split', 'seed')}
  header = {'scoring_model': model.name, 'settings': settings, 'intervals': text_statistics.METHOD}
  try:
    if out:
      with output.replacing(out, f'--out={values.out}') as file:
        file.write((json.dumps({**header, **text_statistics.plain(result)}, indent=2) + '\n').encode())
  finally:  # print the result even if the file cannot be written
    print(f'{values.samples}, scored by {model.name}:\n\n{format_result(result)}')
  return 0


def main(argv=None) -> int:
  """Run the command `ilm-jax perplexity`; return the exit code."""
  return command(__doc__, define, run, argv)
