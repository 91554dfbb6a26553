"""What the configs share: the settings every run has, with the defaults of arXiv 2505.05755."""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config() -> ml_collections.ConfigDict:
  """Return a config that lacks a task and the shape of its data."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.family = 'ilm'
  config.steps = 50_000
  config.stop_at = 0.0  # end early when eval.metric reaches this on validation; 0: never
  config.init_from = ''  # workdir of a run whose weights to start from

  config.model = ml_collections.ConfigDict()
  config.model.preset = placeholder(str)
  config.model.preset = 'small'  # small, tiny, tiny2, xtiny2, 1b or 8b; what follows overrides it
  config.model.num_layers = placeholder(int)
  config.model.num_heads = placeholder(int)
  config.model.d_model = placeholder(int)
  config.model.d_ff = placeholder(int)
  config.model.activation = 'relu'
  config.model.final_norm = True  # the reference has none in its ILM runs
  config.model.dropout = 0.1
  config.model.attention_dropout = 0.1
  config.model.compute = 'mixed'  # bfloat16 products, everything else float32; or float32, or bfloat16
  config.model.scan_layers = False  # compile one block and loop over the layers, for a copy of their parameters
  config.model.remat = False  # compute each block again for the gradient instead of remembering it
  config.model.init = 'normal'
  config.model.open_gap_embedding = (
    False  # ilm, it: the model is told which gaps are open (with corrupt.infill_rate, close_prompt)
  )
  config.model.conditioning = placeholder(str)  # mdm: none, or adaln (its default): the model is told the noise level
  config.model.d_cond = placeholder(int)  # width of what the noise level becomes; 128 by default
  config.model.residual = placeholder(str)  # of adaln: input, or modulated (the reference)

  config.corrupt = ml_collections.ConfigDict()
  config.corrupt.close_prompt = False  # ilm; True: the training softmax leaves the prompt's gaps out
  config.corrupt.infill_rate = 0.0  # ilm, it: share of the examples that are texts with one to three gaps
  config.corrupt.fim_rate = (
    0.0  # arm: share of the examples that are rearranged, so that it learns to fill in the middle
  )
  config.corrupt.eos_weight = 1.0  # it: of an empty gap's end symbol
  config.corrupt.length = 0  # mdm: tokens to which [PAD]s fill an example, to be predicted; 0: the length is given
  config.corrupt.noise_eps = 1e-3  # mdm: share of the tokens that the schedule leaves unmasked at its end

  config.loss = ml_collections.ConfigDict()
  config.loss.stop_weight = 1.0
  config.loss.length_weight = 'none'  # ilm: or elbo, which minimises the bound of the likelihood itself
  config.loss.mdm = 'mean_masked'  # a masked token's mean weighted loss (the reference); or nelbo, a string's bound
  config.loss.vocab_chunk = 2048  # entries of the vocabulary whose logits are alive at a time

  config.data = ml_collections.ConfigDict()
  config.data.batch_size = 64  # examples of a step
  config.data.groups = 1  # packed each by itself; hosts read whole groups
  config.data.rows = 64
  config.data.row_length = 128
  config.data.targets = 0  # dropped tokens of a row; 0: twice row_length
  config.data.segments = 8  # examples of a row
  config.data.num_workers = 0  # processes that prepare batches; 0: a thread
  config.data.prefetch = 8

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.learning_rate = 1e-4
  config.optimizer.schedule = 'constant'  # or cosine, linear: down to final_fraction at the last step
  config.optimizer.warmup_steps = 0
  config.optimizer.final_fraction = 0.0
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999
  config.optimizer.eps = 1e-8
  config.optimizer.weight_decay = 0.01
  config.optimizer.clip = 1.0
  config.optimizer.ema_decay = 0.9999  # 0: none
  config.optimizer.accumulation_steps = 1  # parts a batch is cut into, one after the other

  config.mesh = ml_collections.ConfigDict()
  config.mesh.data = -1  # what is left
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.distributed = ml_collections.ConfigDict()  # of several
  config.distributed.initialization_timeout = 300  # how long they wait for each other
  config.distributed.heartbeat_timeout = 30  # one that is silent for so long is taken for dead, and the run ends

  config.sampling = ml_collections.ConfigDict()
  config.sampling.max_length = 128
  config.sampling.max_steps = placeholder(int)
  config.sampling.stop_threshold = 0.9  # 0: stop with the probability that the stop head gives
  config.sampling.stop_temperature = 1.0
  config.sampling.end_threshold = 0.9  # it: a gap is finished when p([EOS]) is above it; 0: when [EOS] is the argmax
  config.sampling.parallel = False  # it: insert in all unfinished gaps at once
  config.sampling.gaps = 1  # ilm: gaps that a step inserts into, the most probable ones; 0: all
  config.sampling.gap_threshold = 0.0  # ilm, of these: as probable as this share of the best one
  config.sampling.force_first = False  # insert at least one token
  config.sampling.gap = rule(temperature=0.0)
  config.sampling.token = rule(temperature=0.0)
  config.sampling.two_stage = True  # the gap, then the token; False: one draw among all pairs, by the rule `joint`
  config.sampling.joint = rule()
  config.sampling.order = 'ancestral'  # mdm: or top_probability, margin, entropy: the most confident tokens first
  config.sampling.length = 'predicted'  # mdm: [PAD]s to max_length are sampled too; or given with each prompt
  config.sampling.score_draws = 32  # forward passes from which a bound on a likelihood is estimated

  config.eval = ml_collections.ConfigDict()
  config.eval.every = 1_000
  config.eval.batch_size = 100
  config.eval.metric = 'exact_match'
  config.eval.mode = 'max'
  config.eval.checkpoint = 'best'  # which is tested: best (on validation), latest, or a step
  config.eval.samples = 0  # prompts of a split that are answered, at most; 0: all
  config.eval.print_samples = 3
  config.eval.score = 'none'  # or -log p of the test answers: exact, bound, importance-weighted; '': the family's own

  config.log_every = 100
  config.report_seconds = 20.0
  config.checkpoint_every = 1_000
  config.keep = 2
  return config


def rule(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> ml_collections.ConfigDict:
  """How an index is drawn: temperature 0 is greedy."""
  return ml_collections.ConfigDict({'temperature': temperature, 'top_k': top_k, 'top_p': top_p})
