"""The special tokens. Their ids, 0 to 6, are the same in every tokenizer, and text never encodes to them."""

SPECIAL = ('[PAD]', '[CLS]', '[MASK]', '[EOS]', '[BOS]', '[SEP]', '[UNK]')
PAD, CLS, MASK, EOS, BOS, SEP, UNK = range(len(SPECIAL))
