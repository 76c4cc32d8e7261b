"""How captions are cut into words before they are scored."""

import re
import unicodedata

PUNCTUATION = {"''", "'", "``", "`", "-lrb-", "-rrb-", "-lcb-", "-rcb-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
"""The 17 tokens that do not count."""

PLAIN = str.maketrans(
    {"’": "'", "‘": "'", "…": "...", "–": "-", "—": "--", **dict.fromkeys('"“”', " '' ")}
    | {"(": " -lrb- ", ")": " -rrb- ", "{": " -lcb- ", "}": " -rcb- "}
)
CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
JOINED = re.compile(r"\b(?:(can)(not)|(gon|wan)(na)|(got)(ta)|(gim|lem)(me))\b")
MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M"))
LETTER = rf"[\w{MARKS}\u200c\u200d]"  # with what is written onto letters, and what joins and parts them
TOKEN = re.compile(
    r"-[lr][rc]b-"  # brackets
    r"|''|``|\.{3}|--"
    r"|(?:mr|mrs|ms|dr|jr|sr|st|vs)\.|(?:[a-z]\.){2,}"  # abbreviations keep their full stops
    r"|'(?:s|re|ve|ll|d|m)\b"
    r"|\d+(?:[.,:/]\d+)+"
    rf"|{LETTER}+(?:[-'&/]{LETTER}+)*"  # t-shirt, o'clock, n't
    r"|\S"
)


def tokenise(caption: str) -> list[str]:
    """Cut a caption into lower-case words by the rules of the Penn Treebank, without punctuation.

    Contractions and possessives come apart (``do n't``, ``dog 's``), quotation marks, round and curly brackets and the
    other :data:`PUNCTUATION` go, and that of other scripts, hyphens and numbers stay whole. Text that was cut in this
    way stays as it is.

    Differs from the Java tokeniser of the COCO evaluation, which knows more: abbreviations beyond a few titles and
    those of single letters, web addresses, emoticons, currencies, American spelling. On captions of the kind people
    write for photos this is rare. Scores are comparable where all captions were cut by one tokeniser.

    Example:
        >>> tokenise('A man in a "T-shirt" (red) doesn\\'t see the dogs\\' ball at 10:30.')
        ['a', 'man', 'in', 'a', 't-shirt', 'red', 'does', "n't", 'see', 'the', 'dogs', 'ball', 'at', '10:30']
    """
    caption = unicodedata.normalize("NFC", caption)
    text = CONTRACTION.sub(r" \1", caption.lower().translate(PLAIN))
    text = JOINED.sub(lambda joined: " ".join(part for part in joined.groups() if part), text)
    return [token for token in TOKEN.findall(text) if not (token in PUNCTUATION or foreign(token))]


def foreign(token: str) -> bool:
    """Whether this is punctuation beyond ASCII."""
    return not token.isascii() and all(unicodedata.category(letter).startswith("P") for letter in token)
