"""The settings that every config shares, with the defaults of arXiv 2505.05755.

A comment that begins with model families (ILM, ARM, IT, MDM) marks a setting that only these families use.
"""

import ml_collections
from ml_collections.config_dict import FieldReference, placeholder

SECTIONS = ('model', 'corrupt', 'loss', 'data', 'optimizer', 'mesh', 'distributed', 'sampling', 'eval')


def get_config() -> ml_collections.ConfigDict:
  """Return a config without a task; each config file adds its task and the batch shape for it."""
  config = ml_collections.ConfigDict({section: {} for section in SECTIONS})
  config.seed = 0
  config.family = 'ilm'
  config.steps = 50_000
  config.stop_at = 0.0  # stop training early when eval.metric reaches this value on validation; 0: never
  config.init_from = ''  # workdir of another run whose weights initialize this one

  config.model.preset = placeholder(str)
  config.model.preset = 'small'  # small, tiny, tiny2, xtiny2, 1b or 8b; the sizes below override it
  config.model.update({size: placeholder(int) for size in ('num_layers', 'num_heads', 'd_model', 'd_ff')})
  config.model.activation = 'relu'
  config.model.final_norm = True  # LayerNorm before the output embedding; the authors' ILM runs have none
  config.model.dropout = config.model.attention_dropout = 0.1
  config.model.compute = 'mixed'  # mixed (matrix products in bfloat16, all else in float32), float32 or bfloat16
  config.model.scan_layers = False  # apply the layers by lax.scan: compiles faster, but copies their parameters
  config.model.remat = False  # rematerialization: recompute each block in the backward pass to save memory
  config.model.init = 'normal'  # initial embeddings: normal, from N(0, 0.02), or reference, from N(0, 1)
  config.model.open_gap_embedding = False  # ILM, IT: tell the model which gaps are open; needs corrupt.close_prompt
  config.model.conditioning = placeholder(str)  # MDM: conditioning on the noise level: adaln (the default) or none
  config.model.d_cond = placeholder(int)  # MDM: width of the noise level embedding; 128 by default
  config.model.residual = placeholder(str)  # MDM: attention's skip connection: input, or modulated (starts after adaLN)

  config.corrupt.close_prompt = False  # ILM, IT: exclude gaps within the prompt from the training softmax
  config.corrupt.infill_rate = 0.0  # ILM, IT: fraction of examples turned into infilling examples with 1 to 3 gaps
  config.corrupt.fim_rate = 0.0  # ARM: fraction of examples rearranged for fill-in-the-middle
  config.corrupt.eos_weight = 1.0  # IT: loss weight of [EOS], the target of a gap with no missing tokens
  config.corrupt.length = 0  # MDM: pad examples to this length and train to predict the [PAD]s; 0: no padding
  config.corrupt.noise_eps = 1e-3  # MDM: fraction of tokens that stay unmasked at the end of the noise schedule

  config.loss.stop_weight = 1.0  # ILM: weight of the stop head's loss
  config.loss.length_weight = 'none'  # ILM: none (as in the paper), or elbo: minimize an upper bound on the NLL
  config.loss.mdm = 'mean_masked'  # MDM: mean_masked (weighted mean over masked tokens, as the authors do) or nelbo
  config.loss.vocab_chunk = 2048  # vocabulary entries per chunk of the chunked softmax

  config.data.batch_size = 64  # examples per training step
  config.data.groups = 1  # number of groups per batch that are packed separately; each process reads whole groups
  config.data.rows = 64  # packed rows per training step
  config.data.row_length = 128  # tokens per row
  config.data.targets = 0  # maximum loss targets (dropped tokens) per row; 0: twice row_length
  config.data.segments = 8  # maximum examples per row
  config.data.num_workers = 0  # worker processes that prepare batches; 0: a thread of this process
  config.data.prefetch = 8  # batches prepared in advance

  config.optimizer.learning_rate = 1e-4
  config.optimizer.schedule = 'constant'  # constant, or cosine or linear decay to final_fraction x learning_rate
  config.optimizer.warmup_steps = 0
  config.optimizer.final_fraction = 0.0
  config.optimizer.update(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
  config.optimizer.clip = 1.0  # gradient clipping: maximum global norm; 0: no clipping
  config.optimizer.ema_decay = 0.9999  # decay of the moving average of the weights; 0: no average
  config.optimizer.accumulation_steps = 1  # gradient accumulation: microbatches per training step

  config.mesh.data = -1  # number of devices along each mesh axis; -1: all remaining devices
  config.mesh.fsdp = config.mesh.tensor = 1

  config.distributed.initialization_timeout = 300  # seconds to wait for all processes of a run at the start
  config.distributed.heartbeat_timeout = 30  # seconds without a heartbeat after which a process counts as lost

  config.sampling.max_length = 128  # maximum number of tokens of prompt and completion together
  config.sampling.max_steps = placeholder(int)  # maximum decoding steps; by default limited only by max_length
  config.sampling.update({threshold: placeholder(float) for threshold in ('stop_threshold', 'end_threshold')})
  config.sampling.stop_threshold = 0.9  # ILM: stop when p(stop) exceeds this; 0: stop with probability p(stop)
  config.sampling.stop_temperature = 1.0  # ILM: temperature of the stop head
  config.sampling.end_threshold = 0.9  # IT: finish a gap when p([EOS]) exceeds this; 0: when [EOS] is most probable
  config.sampling.parallel = False  # IT: insert into all unfinished gaps in each decoding step
  config.sampling.gaps = 1  # ILM: insertions per decoding step, into the most probable gaps; 0: all gaps
  config.sampling.gap_threshold = 0.0  # ILM: if gaps != 1, skip gaps below this fraction of the largest gap probability
  config.sampling.force_first = False  # ILM: insert at least one token before stopping
  config.sampling.bytes = False  # allow byte tokens (parts of a character); texts may then contain U+FFFD
  config.sampling.gap = rule(temperature=0.0)  # ILM: sampling rule for the gap to insert into
  config.sampling.token = rule(temperature=0.0)  # sampling rule for tokens
  config.sampling.two_stage = True  # ILM: sample the gap, then the token; False: sample both at once, by `joint`
  config.sampling.joint = rule()  # ILM: sampling rule for (gap, token) pairs if two_stage is False
  config.sampling.order = 'ancestral'  # MDM: ancestral, or most confident first, by top_probability, margin or entropy
  config.sampling.length = 'predicted'  # MDM: predicted (by sampling [PAD]s at the end), or given (with each prompt)
  config.sampling.score_draws = 32  # forward passes per example to estimate a bound on its likelihood

  config.eval.every = 1_000  # training steps between evaluations on the validation split
  config.eval.batch_size = 100  # prompts per sampling batch
  config.eval.metric = 'exact_match'  # validation metric that selects the best checkpoint
  config.eval.mode = 'max'  # whether the best metric is the largest (max) or the smallest (min)
  config.eval.checkpoint = 'best'  # checkpoint to test: best (on validation), latest, or a step
  config.eval.samples = 0  # maximum prompts of a split to complete; 0: all
  config.eval.print_samples = 3  # completions to print at each evaluation
  config.eval.score = 'none'  # likelihood of test answers: none, exact, bound, importance-weighted; '': family default

  config.log_every = 100  # training steps between two log entries
  config.report_seconds = 20.0  # seconds between progress lines on the console
  config.checkpoint_every = 1_000  # training steps between checkpoints
  config.keep = 2  # number of latest checkpoints to keep, besides the best
  return config


def optional_settings() -> list[str]:
  """Return the names of the settings that may be None, such as model.num_layers."""
  names = []
  for section, settings in ((section, get_config()[section]) for section in SECTIONS):
    fields = settings.items(preserve_field_references=True)
    names += [f'{section}.{name}' for name, value in fields if isinstance(value, FieldReference)]
  return names


def rule(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> ml_collections.ConfigDict:
  """Return a sampling rule: temperature 0 is greedy; top_k 0 and top_p 1 keep all candidates."""
  return ml_collections.ConfigDict({'temperature': temperature, 'top_k': top_k, 'top_p': top_p})
