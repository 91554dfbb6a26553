"""Text of one's own: `--config=configs/text.py:small|full --config.data.path=PATH`.

small   `python -m ilm_jax.main --config=configs/text.py:small --config.data.path=PATH`: documents of up to 256 tokens,
        1.9M parameters, batch 32, for 2 CPU cores. Not run yet.
full    `python -m ilm_jax.main --config=configs/text.py:full --config.data.path=PATH --workdir=runs/text`: documents of
        up to 1,024 tokens; model and learning rate are those of the paper's stories. Not run yet.

PATH is a file, or a folder (of a bucket perhaps) of *.txt, *.tokens or *.jsonl (the field `text` of each line); names
that hold train, valid, heldout or test are the splits, else a hash of the document decides. In a *.txt a document ends
with a line <|endoftext|> and with the file; `--config.task.documents=paragraph` or `line` if it is otherwise.

The tokenizer is SentencePiece, trained on the corpus, or `--config.task.tokenizer.path=`: a SentencePiece model, or a
WordPiece vocabulary (bert-base-uncased's vocab.txt is the paper's), or a folder with one.
"""

import ml_collections

from ilm_jax.configs import default

NAMES = ('small', 'full')


def get_config(name: str = 'small') -> ml_collections.ConfigDict:
  """Return the config of one of NAMES."""
  config = text_config('text', name, length=1_024)
  config.task.split_long_documents = True
  return config


def text_config(label: str, name: str, *, length: int) -> ml_collections.ConfigDict:
  """Return what the configs of text share: the sizes of the paper, or small ones.

  Args:
    label: of the corpus; its file is configs/LABEL.py.
    name: one of NAMES.
    length: tokens of the longest example, of the full size.
  """
  if name not in NAMES:
    raise ValueError(f'configs/{label}.py:{name}: expected one of {", ".join(NAMES)} behind the colon')
  full = name == 'full'
  config = default.get_config()
  config.data.path = ''  # of the corpus
  task = config.task = ml_collections.ConfigDict({'name': 'text', 'label': label if full else f'{label} {name}'})
  task.corpus = config.data.get_ref('path')  # the same
  task.source = ''  # where the path is empty: tinystories or lm1b, downloaded
  task.documents = 'endoftext'  # what ends one in a *.txt: a line <|endoftext|>; or line, or paragraph
  task.detokenize = False  # undo the spaces of the One Billion Word corpus
  task.length = length if full else 256  # tokens of an example, [CLS] and [BOS] included; what is longer is cut
  task.split_long_documents = False  # what is cut off a document becomes further examples
  task.num_train = 0  # examples; 0: all
  task.num_validation = 1_000 if full else 200
  task.num_test = 1_000 if full else 200
  task.cache = 'data'  # folder for the prepared corpus, downloads and trained tokenizers; '': a temporary one

  words = task.tokenizer = ml_collections.ConfigDict()
  words.path = ''  # '': train SentencePiece on the corpus
  words.lowercase = True  # of a WordPiece vocabulary
  words.size = 10_000 if full else 4_000  # of the trained vocabulary
  words.documents = 500_000 if full else 20_000  # to train on, at most
  words.seed = 0  # of their choice
  words.normalization = 'identity'  # or nfkc, nmt_nfkc, nfkc_cf, nmt_nfkc_cf
  words.fingerprint = ''  # set by the run: which tokenizer it has

  config.corrupt.length = config.sampling.max_length = task.get_ref('length')
  config.sampling.token = default.rule(top_p=0.9)
  config.eval.metric, config.eval.mode = 'loss', 'min'
  config.eval.samples = 16
  config.eval.batch_size = 16
  config.eval.perplexity_model = ''  # of the texts sampled for the test: the workdir of an ARM run, or hf:NAME
  config.optimizer.warmup_steps = 1_000
  # Rows are sized so that everything fits, of documents that are all of the full length: in 10,000 drawn steps nothing
  # was left out. Autoregressive models, which drop nothing, need almost twice as many.
  if full:
    config.steps = 100_000
    config.model.update({'final_norm': False, 'init': 'reference'})  # as the reference
    config.data.update({'batch_size': 256, 'rows': 160, 'row_length': 1_024, 'segments': 24})
    config.eval.every = config.checkpoint_every = 5_000
  else:
    config.steps = 5_000
    config.model.update({'preset': None, 'num_layers': 4, 'num_heads': 4, 'd_model': 128, 'd_ff': 512})
    config.model.dropout = config.model.attention_dropout = 0.0
    config.data.update({'batch_size': 32, 'rows': 14, 'row_length': 512, 'segments': 16})
    config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 200, 'ema_decay': 0.999})
    config.eval.every = config.checkpoint_every = 500
    config.eval.samples = 8
  return config
