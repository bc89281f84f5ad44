"""What masks allow, token by token."""


def allows(bits, token_id):
    return bool(bits[token_id // 32] >> (token_id % 32) & 1)


def accepts(compiler, tokenizer, constraint, text):
    """Whether every token of a text may be drawn in turn and the text may end behind the last one."""
    mask, ids = compiler.mask(constraint), tokenizer.encode(text, add_special=False, parse_special=False)
    for done, token_id in enumerate(ids):
        if not allows(mask.bits(ids[:done]), token_id):
            return False
    return mask.is_complete(ids) or any(allows(mask.bits(ids), end) for end in tokenizer.eog_ids)
