"""Tests of tokenizers: common interface, SentencePiece, WordPiece against a simple reimplementation, damaged files."""

import codecs
import io
import json
import logging
import pickle
import sys

import numpy as np
import pytest
from text_helpers import DATA, needs_real_text, refused

from ilm_jax.data import tokenizers as lib
from ilm_jax.data.tokenizers import SentencePiece, WordPiece, WordTokenizer
from ilm_jax.special_tokens import BOS, CLS, MASK, SPECIAL, UNK
from ilm_jax.types import UserError

LINES = [
  'The old boat lay on the sand, and nobody knew whose it was.',
  'Mara asked the baker; the baker asked his sister: "Is it yours?"',
  "It wasn't hers. She hadn't rowed since the year of the flood.",
  'So the boat stayed where it was, and the sand came up to its seats.',
  'In spring a heron stood in it. In summer, two children did.',
  '“Naïve,” said the café owner (he was from Zürich) — “pay 5 € or go!”',
]
UNUSUAL = [
  '',
  ' ',
  '  two  spaces, and one at the end ',
  'tab\there\nline\n\n\nparagraph\r\nold line',
  'zero \x00 and bell \x07',
  '日本語 русский العربية ελληνικά',
  'e\u0301 as two, é as one; ﬁ ligature, ½, Å Å',
  '👩\u200d👩\u200d👧 🙂🏽 \U0001f1e9\U0001f1ea',
  '\ufeffmark \u00a0hard\u2009thin \u200bno width',
  'a' * 300,
]
NAMES = [  # texts that look like special tokens
  *SPECIAL,
  *('<|endoftext|>', '<s>', '</s>', '<unk>', '<pad>', '<0x41>', '[unused0]', '##ing', '<mask>'),
]


def sentencepiece_model(**settings) -> bytes:
  """Train a SentencePiece model with SentencePiece's default settings, except `settings`; return its file content."""
  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LINES * 3), model_writer=model, hard_vocab_limit=False, minloglevel=2, **settings
  )
  return model.getvalue()


def given_model() -> bytes:
  return sentencepiece_model(vocab_size=90, control_symbols=['<ctl>'], user_defined_symbols=['<mask>'])


def vocabulary() -> bytes:
  """Return a small vocabulary file like BERT's: special tokens, unused entries, letters and a few longer pieces."""
  letters = 'abcdefghijklmnopqrstuvwxyz0123456789'
  words = ['[PAD]', '[unused0]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'.,;:!?\'"()-—“”€', *letters]
  words += [f'##{letter}' for letter in letters]
  words += ['the', 'boat', 'sand', 'it', 'was', '##ed', '##er', 'ask', 'bak', 'in', 'naive', 'cafe', '##ing']
  return ('\n'.join(words) + '\n').encode()


@pytest.fixture(scope='module')
def ours():
  return lib.train_sentencepiece(LINES * 3, size=380)


@pytest.fixture(scope='module')
def tokenizers(ours):
  return {
    'trained': ours,
    'folding': lib.train_sentencepiece(LINES * 3, size=380, normalization='nfkc_cf'),
    'given': SentencePiece(given_model()),
    'bpe': SentencePiece(sentencepiece_model(vocab_size=400, model_type='bpe', byte_fallback=True, pad_id=3)),
    'wordpiece': WordPiece(vocabulary()),
    'cased': WordPiece(vocabulary(), lowercase=False),
  }  # fmt: skip


@pytest.fixture(params=['trained', 'folding', 'given', 'bpe', 'wordpiece', 'cased'])
def tokenizer(request, tokenizers):
  return tokenizers[request.param]


def random_texts(count: int):
  """Yield texts of letters, spaces, punctuation, and random Unicode characters."""
  rng = np.random.default_rng(5)
  alphabet = list('abc ABC  .,!?\'"\n\t-éßﬁ½日🙂\u0301\u200d') + LINES[0].split()
  for _ in range(count):
    parts = [alphabet[i] for i in rng.integers(len(alphabet), size=rng.integers(30))]
    codes = rng.integers(1, 0x110000, size=3)
    yield ''.join(parts) + ''.join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)


# --- common interface -------------------------------------------------------------------------------------------------


def test_special_ids_are_0_to_6_and_text_is_never_encoded_as_them_except_unk(tokenizer):
  assert tokenizer.special_ids == (0, 1, 2, 3, 4, 5, 6)
  for text in [*LINES, *UNUSUAL, *NAMES, ' '.join(NAMES), f'a{"".join(NAMES)}b']:
    ids = tokenizer.encode(text)
    assert all(UNK <= i < tokenizer.vocab_size for i in ids), (text, ids)


def test_token_offsets_are_in_order_and_do_not_overlap(tokenizer):
  for text in [*LINES, *UNUSUAL, *NAMES, *random_texts(200)]:
    ids, spans = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert len(ids) == len(spans)
    bounds = [0, *(bound for span in spans for bound in span), len(text)]
    assert bounds == sorted(bounds), (text, spans)


def test_decoding_skips_special_tokens_and_pieces_show_them_in_brackets(tokenizer):
  ids = tokenizer.encode('the boat')
  assert tokenizer.decode([CLS, BOS, *ids, 0, MASK]) == tokenizer.decode(ids)
  assert tokenizer.decode([]) == tokenizer.decode([CLS, BOS]) == ''
  assert tokenizer.pieces([*range(7)]) == list(SPECIAL)
  assert len(tokenizer.pieces(np.array(ids))) == len(ids) and isinstance(tokenizer.decode(np.array(ids, np.int32)), str)


def test_every_id_has_a_different_piece(tokenizer):
  pieces = tokenizer.pieces(range(tokenizer.vocab_size))
  assert len(set(pieces)) == len(pieces) == tokenizer.vocab_size


def test_saving_or_pickling_preserves_a_tokenizer(tokenizer, tmp_path):
  tokenizer.save(tmp_path / 'words')
  written = {path.name: path.read_bytes() for path in (tmp_path / 'words').iterdir()}
  for other in (lib.load(tmp_path / 'words'), lib.read(str(tmp_path / 'words')), pickle.loads(pickle.dumps(tokenizer))):
    assert other.fingerprint == tokenizer.fingerprint and other.vocab_size == tokenizer.vocab_size
    for text in LINES:
      assert other.encode(text) == tokenizer.encode(text)
      assert other.decode(other.encode(text)) == tokenizer.decode(tokenizer.encode(text))
  lib.load(tmp_path / 'words').save(tmp_path / 'again')
  assert {path.name: path.read_bytes() for path in (tmp_path / 'again').iterdir()} == written


def test_different_tokenizers_have_different_fingerprints(tokenizers):
  assert len({tokenizer.fingerprint for tokenizer in tokenizers.values()}) == len(tokenizers)


def test_an_unpaired_surrogate_is_refused(tokenizer):
  for call in (tokenizer.encode, tokenizer.encode_with_offsets):
    with refused('character 2', 'surrogate'):
      call('ab\ud83dc')


def test_word_tokenizers_have_the_common_interface(tmp_path):
  words = WordTokenizer(['7', 'left-of', '='])
  assert words.encode(' 7  =\n7 ') == [7, 9, 7]
  assert words.encode_with_offsets(' 7  =\n7 ') == ([7, 9, 7], [(1, 2), (4, 5), (6, 7)])
  assert words.decode([CLS, 7, 8, BOS, 9]) == '7 left-of ='
  assert words.pieces([CLS, 7, 8]) == ['[CLS]', '7', 'left-of']
  words.save(tmp_path)
  assert lib.load(tmp_path).words == words.words
  with pytest.raises(UserError, match=r"unknown token '\[BOS\]'"):
    words.encode('7 [BOS]')


# --- SentencePiece ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'texts', [LINES, UNUSUAL, NAMES, list(random_texts(300))], ids=['lines', 'unusual', 'names', 'random']
)
def test_decoding_with_a_trained_sentencepiece_model_restores_every_character(ours, texts):
  for text in texts:
    text = text.replace('\u2581', '')
    ids, spans = ours.encode_with_offsets(text)
    assert ours.decode(ids) == text
    assert ''.join(text[start:end] for start, end in spans) == text
    assert UNK not in ids
  assert ours.decode(ours.encode('a\u2581b')) == 'a b', 'U+2581 is the only character that decoding does not restore'


def test_the_span_of_each_token_covers_the_characters_of_its_piece(ours):
  for text in [*LINES, *random_texts(100)]:
    for i, (start, end) in zip(*ours.encode_with_offsets(text.replace('\u2581', '')), strict=True):
      piece, surface = ours.pieces([i])[0], text.replace('\u2581', '')[start:end]
      if not piece.startswith('<0x'):
        assert piece.replace('\u2581', ' ') == surface
      else:
        assert len(surface) <= 1 and (not surface or surface.encode()[-1] == int(piece[3:5], 16))


def test_nfkc_cf_normalization_folds_case_and_compatibility_characters(tokenizers):
  folding = tokenizers['folding']
  assert folding.decode(folding.encode('The ﬁrst ½ of Å')) == 'the first 1⁄2 of å'


def test_a_line_break_is_a_separate_token(ours):
  (line,) = ours.encode('\n')
  ids = ours.encode('sand.\n\nThe boat\n')
  assert ids.count(line) == 3 and ours.pieces([line]) == ['<0x0A>']
  assert ours.decode([i for i in ids if i != line]) == 'sand.The boat'


def test_sentencepiece_training_is_deterministic(ours):
  again = lib.train_sentencepiece(iter(LINES * 3), size=380)
  assert again.files() == ours.files() and again.fingerprint == ours.fingerprint
  assert lib.train_sentencepiece(LINES[1:] * 3, size=380).fingerprint != ours.fingerprint


def test_the_size_setting_is_the_maximum_vocabulary_size_including_special_tokens():
  assert lib.train_sentencepiece(LINES * 3, size=340).vocab_size == 340
  assert lib.train_sentencepiece(LINES * 3, size=5_000).vocab_size < 1_000


@pytest.mark.parametrize(
  ('settings', 'parts'),
  [
    ({'size': 7}, ['task.tokenizer.size=7', '256 bytes']),
    ({'size': 270}, ['task.tokenizer.size=270 is too small', 'at least 310', '47 different characters', '256 bytes']),
    ({'size': 380, 'normalization': 'nfd'}, ["task.tokenizer.normalization='nfd'", 'identity, nfkc']),
  ],
)
def test_invalid_training_settings_are_refused(settings, parts):
  with refused(*parts):
    lib.train_sentencepiece(LINES, **settings)


def test_every_character_of_the_training_text_is_a_piece_of_its_own():
  rare = 'ж日\u2585\ufeff\t🙂\u0301'
  texts = [*LINES * 100, 'one 日 \u2585 and\t🙂, e\u0301', 'a\ufeffb']
  trained = lib.train_sentencepiece(texts, size=500, characters=set(''.join(texts) + 'ж\n\0'))
  for text in [*rare, *LINES, *texts[-2:]]:
    ids = trained.encode(text)
    assert not set(ids) & set(trained.byte_ids) and trained.decode(ids) == text
    assert len(ids) == 1 or text not in rare
  assert set(trained.encode('Ω')) < set(trained.byte_ids) and trained.decode(trained.encode('Ω')) == 'Ω'
  seen = {piece for piece in trained.words if len(piece) == 1}
  assert seen == set(''.join(texts) + 'ж').difference(' ') | {'\u2581'}


def test_byte_ids_are_the_tokens_for_single_bytes_except_tab_and_line_breaks(tokenizers):
  for name, tokenizer in tokenizers.items():
    expected = [f'<0x{b:02X}>' for b in range(256) if chr(b) not in '\t\n\r']
    expected = expected if name in ('trained', 'folding', 'bpe') else []
    assert tokenizer.pieces(tokenizer.byte_ids) == expected and isinstance(tokenizer.byte_ids, tuple)
  assert len(tokenizers['trained'].byte_ids) == 253 and WordTokenizer(['<0xFF>']).byte_ids == ()


def test_a_vocabulary_just_large_enough_for_the_characters_of_the_text_can_be_trained():
  needed = 7 + 256 + len(set(''.join(LINES)))
  assert lib.train_sentencepiece(LINES * 3, size=needed).vocab_size == needed
  with refused(f'size={needed - 1}', f'at least {needed}'):
    lib.train_sentencepiece(LINES * 3, size=needed - 1)


def test_training_uses_long_lines_and_lines_that_end_in_a_reserved_character_or_a_space(caplog):
  caplog.set_level(logging.INFO, 'absl')
  names = ['quagga', 'gnus', 'okapi', 'zebu']
  words = np.random.default_rng(0).choice(names, 200_000)
  long, reserved = ' '.join(words), [' '.join([*words[i : i + 5], '\u2585']) for i in range(0, 2_000, 5)]
  spaced = [' '.join([*words[i : i + 5], '']) for i in range(0, 2_000, 5)]
  assert len(long) > 2**20, 'SentencePiece leaves out lines of more than 1 MiB'
  for lines in ([long], reserved, spaced):
    trained = lib.train_sentencepiece([*lines, *LINES], size=340)
    assert [trained.pieces(trained.encode(f' {name}')) for name in names] == [[f'\u2581{name}'] for name in names]
  (line,) = [line for line in caplog.messages if line.startswith('cut ')]
  assert line == 'cut 1 of the training lines of the tokenizer at the limit of 4,096 characters'
  assert max(map(len, lib._sentences(['x' * 600_000]))) == 4096, 'training is slow on long repetitive lines'


def test_a_sentencepiece_model_loaded_from_a_file_keeps_its_pieces_in_order_but_not_its_control_symbols():
  import sentencepiece

  model = given_model()
  theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
  assert [theirs.id_to_piece(i) for i in range(5)] == ['<unk>', '<s>', '</s>', '<ctl>', '<mask>']
  ours = SentencePiece(model)
  assert ours.vocab_size == 7 + theirs.vocab_size() - 4
  for text in LINES:
    expected = [UNK if i == 0 else 7 + i - 4 for i in theirs.encode(text)]
    assert ours.encode(text) == expected
    assert ours.decode(expected) == theirs.decode(theirs.encode(text))
  assert ours.encode('日')[-1] == UNK and ours.pieces([UNK]) == ['[UNK]']


# --- WordPiece --------------------------------------------------------------------------------------------------------


def greedy_wordpiece(text: str, ids: dict[str, int]) -> list[int]:
  """Tokenize lower-case ASCII: split at spaces and punctuation, then take the longest matching entry repeatedly."""
  words, word = [], ''
  for letter in text + ' ':
    if letter.isalnum():
      word += letter
      continue
    words += [word] if word else []
    words += [letter] if not letter.isspace() else []
    word = ''
  out = []
  for word in words:
    pieces, start = [], 0
    while start < len(word):
      ends = [end for end in range(start + 1, len(word) + 1) if ('##' if start else '') + word[start:end] in ids]
      if not ends:
        pieces = [UNK]
        break
      pieces.append(ids[('##' if start else '') + word[start : max(ends)]])
      start = max(ends)
    out += pieces
  return out


def test_wordpiece_matches_the_longest_vocabulary_entry_first(tokenizers):
  wordpiece = tokenizers['wordpiece']
  ids = {word: i for i, word in enumerate(wordpiece.pieces(range(wordpiece.vocab_size))) if i >= 7}
  assert ids['[unused0]'] == 7 and ids['.'] == 8
  rng = np.random.default_rng(2)
  letters = list('abt ehs. it!-_') + ['the ', 'boat', 'ing', 'ed ', '(', '#']
  texts = [''.join(letters[i] for i in rng.integers(len(letters), size=25)) for _ in range(200)]
  for text in [*LINES[:5], *texts]:
    text = text.lower()
    assert wordpiece.encode(text) == greedy_wordpiece(text, ids), text


def test_wordpiece_folds_case_and_accents_only_if_uncased(tokenizers):
  assert tokenizers['wordpiece'].pieces(tokenizers['wordpiece'].encode('Naïve CAFÉ')) == ['naive', 'cafe']
  assert tokenizers['cased'].pieces(tokenizers['cased'].encode('naive Cafe')) == ['naive', '[UNK]']


def test_encoding_text_decoded_by_wordpiece_gives_the_same_ids(tokenizers):
  wordpiece = tokenizers['wordpiece']
  for text in LINES:
    ids = wordpiece.encode(text)
    assert UNK not in ids and wordpiece.encode(wordpiece.decode(ids)) == ids
  assert wordpiece.decode(wordpiece.encode('It  wasn’t The Boat.')) == 'it wasn [UNK] t the boat.'
  assert wordpiece.decode(wordpiece.encode('the boat, the sand.')) == 'the boat, the sand.'


def test_a_byte_order_mark_at_the_start_of_a_vocabulary_is_not_part_of_its_first_word(tmp_path, tokenizers):
  (tmp_path / 'vocab.txt').write_bytes(codecs.BOM_UTF8 + vocabulary())
  assert lib.read(tmp_path).fingerprint == tokenizers['wordpiece'].fingerprint


def test_the_path_of_a_tokenizer_may_start_with_a_tilde_or_a_file_scheme(tmp_path, tokenizers, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'vocab.txt').write_bytes(vocabulary())
  for path in ('~', '~/vocab.txt', f'file://{tmp_path}'):
    assert lib.read(path).fingerprint == tokenizers['wordpiece'].fingerprint


@needs_real_text
def test_the_bert_base_uncased_vocabulary_has_the_size_published_in_the_ilm_paper():
  wordpiece = lib.read(DATA / 'bert-base-uncased' / 'vocab.txt')
  lines = (DATA / 'bert-base-uncased' / 'vocab.txt').read_text('utf-8').split('\n')[:-1]
  assert wordpiece.vocab_size == 30_524 == len(lines) + 2
  words = [line for line in lines if line not in ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')]
  ids = wordpiece.encode('The boat was unmanned, again.')
  assert ids == [7 + words.index(word) for word in ('the', 'boat', 'was', 'unmanned', ',', 'again', '.')]
  assert lib.read(DATA / 'bert-base-uncased').fingerprint == wordpiece.fingerprint


# --- damaged and missing files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('content', 'parts'),
  [
    (b'', ['not a WordPiece vocabulary']),
    (b'a\nb\na\n', ['not a WordPiece vocabulary', 'one word per line']),
    (b'a\n\nb\n', ['not a WordPiece vocabulary']),
    (b'once upon a time\n', ['not a WordPiece vocabulary']),
    (b'[PAD]\n[UNK]\n', ['not a WordPiece vocabulary']),
    (b'a\nb\xff\n', ['not UTF-8', 'byte 3 is 0xff']),
  ],
)
def test_errors_for_invalid_vocabularies_name_the_file(tmp_path, content, parts):
  (tmp_path / 'vocab.txt').write_bytes(content)
  with refused('vocab.txt', *parts):
    lib.read(tmp_path)


def test_errors_for_invalid_models_name_the_file(ours, tmp_path):
  model = ours.files()['sentencepiece.model']
  for content in (b'', b'\n', b'no model at all', b'\x00' * 100, model[: len(model) // 2]):
    (tmp_path / 'my.model').write_bytes(content)
    with refused('my.model', 'not a SentencePiece model'):
      lib.read(tmp_path / 'my.model')


def test_errors_for_missing_tokenizers_name_the_expected_files(tmp_path):
  missing = [(lib.read, tmp_path / name, [name, 'does not exist', '*.model']) for name in ('none.model', 'none')]
  empty = [(lib.read, tmp_path, list(lib.MODEL_FILES)), (lib.load, tmp_path, ['not a saved tokenizer'])]
  for read, path, parts in missing + empty:
    with refused(*parts):
      read(path)


def test_errors_for_damaged_saved_tokenizers_name_the_file(ours, tmp_path):
  ours.save(tmp_path)
  model = tmp_path / 'sentencepiece.model'
  content = model.read_bytes()
  model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  with refused(str(tmp_path), 'damaged'):
    lib.load(tmp_path)
  model.unlink()
  with refused(str(tmp_path), 'sentencepiece.model'):
    lib.load(tmp_path)
  for info in ('', '[]', '{}', json.dumps({'kind': 'other', 'fingerprint': ''})):
    (tmp_path / lib.INFO_FILE).write_text(info)
    with refused(str(tmp_path), lib.INFO_FILE):
      lib.load(tmp_path)


def test_the_error_for_the_missing_tokenizers_package_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with refused('vocab.txt', 'ilm_jax[wordpiece]'):
    WordPiece(vocabulary(), name='vocab.txt')
