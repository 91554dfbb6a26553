"""Config for your own text: `--config=configs/text.py:small --config.data.path=PATH`. Variants: small, full.

small   documents of up to 256 tokens, 1.9M parameters, batch 32, for two CPU cores.
full    documents of up to 1,024 tokens, with the model and learning rate that the paper uses for stories. Not yet
        trained.

PATH is a file or a folder, local or in a bucket, of *.txt, *.tokens, *.jsonl, *.ndjson or *.parquet files (field `text`
of each line or row), also compressed (*.gz). File names with the word train, valid, heldout or test select the split;
otherwise, a hash of each document selects it. In a *.txt file, a document ends with a line <|endoftext|> or with the
file; see `task.documents`.

The tokenizer is a SentencePiece model that is trained on the corpus, or the one at `--config.task.tokenizer.path=`: a
SentencePiece model, a WordPiece vocabulary (the paper uses bert-base-uncased's vocab.txt), or a folder with either.
"""

import ml_collections

from ilm_jax.configs import default

VARIANTS = {
  'small': 'your own text, up to 256 tokens, 1.9M parameters; needs --config.data.path',
  'full': "your own text, up to 1,024 tokens, the paper's model; needs --config.data.path",
}


def get_config(name: str = 'small') -> ml_collections.ConfigDict:
  """Return the config of a variant, one of the keys of VARIANTS."""
  config = text_config('text', name, length=1_024)
  config.task.split_long_documents = True
  return config


def text_config(label: str, name: str, *, length: int) -> ml_collections.ConfigDict:
  """Return the variant `name` of the config `label`; the variant full has examples of up to `length` tokens."""
  if name not in VARIANTS:
    raise ValueError(f'configs/{label}.py:{name}: expected one of {", ".join(VARIANTS)} after the colon')
  full = name == 'full'
  config = default.get_config()
  config.data.path = ''  # file or folder of the corpus
  task = config.task = ml_collections.ConfigDict({'name': 'text', 'label': label if full else f'{label} {name}'})
  task.corpus = config.data.get_ref('path')  # alias of data.path
  task.source = ''  # corpus to download if data.path is empty: tinystories or lm1b
  task.documents = 'endoftext'  # what ends a document of a *.txt file: endoftext, line or paragraph
  task.detokenize = False  # undo the tokenization of the One Billion Word corpus
  task.length = length if full else 256  # maximum tokens of an example, including [CLS] and [BOS]
  task.split_long_documents = False  # split a long document into several examples, instead of truncating it
  task.num_train = 0  # number of training examples; 0: all
  task.num_validation = task.num_test = 1_000 if full else 200
  task.cache = 'data'  # folder for downloads, prepared text and trained tokenizers; '': a temporary folder

  words = task.tokenizer = ml_collections.ConfigDict()
  words.path = ''  # tokenizer to use; '': train a SentencePiece model on the corpus
  words.lowercase = True  # whether the WordPiece vocabulary at `path` is lower case
  words.size = 10_000 if full else 4_000  # vocabulary size of a trained tokenizer
  words.documents = 500_000 if full else 20_000  # maximum documents to train the tokenizer on
  words.seed = 0  # random seed for choosing the documents to train the tokenizer on
  words.normalization = 'identity'  # Unicode normalization: identity, nfkc, nmt_nfkc, nfkc_cf or nmt_nfkc_cf
  words.fingerprint = ''  # hash of the tokenizer; set when a run starts

  config.corrupt.length = config.sampling.max_length = task.get_ref('length')
  config.sampling.token = default.rule(top_p=0.9)
  config.eval.metric, config.eval.mode = 'loss', 'min'
  config.eval.samples = config.eval.batch_size = 16
  config.eval.perplexity_model = ''  # model that scores samples: workdir of an ARM run, or hf:NAME (Hugging Face)
  config.optimizer.warmup_steps = 1_000
  # These numbers of packed rows held all examples of 10,000 batches, even of documents of maximum length; family=arm,
  # which drops no tokens, needs almost twice as many.
  if full:
    config.steps = 100_000
    config.model.update({'final_norm': False, 'init': 'reference'})  # as in the reference implementation
    config.data.update({'batch_size': 256, 'rows': 160, 'row_length': 1_024, 'segments': 24})
    config.eval.every = config.checkpoint_every = 5_000
  else:
    config.steps = 5_000
    config.model.update(preset=None, num_layers=4, num_heads=4, d_model=128, d_ff=512, dropout=0, attention_dropout=0)
    config.data.update({'batch_size': 32, 'rows': 14, 'row_length': 512, 'segments': 16})
    config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 200, 'ema_decay': 0.999})
    config.eval.every = config.checkpoint_every = 500
    config.eval.samples = 8
  return config
