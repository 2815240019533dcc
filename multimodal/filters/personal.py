"""Personal data in texts: what has a form that can be checked.

Names and addresses have none, so they are not found. Numbers of cards and accounts are checked by
their check digits, so that other long numbers stay.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """pattern: what may be one. check: whether it is."""

    pattern: re.Pattern[str]
    check: Callable[[str], bool] = lambda text: True


def find_personal(text: str, kinds: tuple[str, ...]) -> Iterator[tuple[int, int, str]]:
    """Where something of these kinds stands: start, end and its kind, in the order of ``kinds``.

    What follows a number may look like a part of it. So if a match does not pass its check, shorter
    ones are tried, and then those that start later.
    """
    for name in kinds:
        kind, place = KINDS[name], 0
        while found := kind.pattern.search(text, place):
            start = found.start()
            end = next((end for end in _ends(found) if kind.check(text[start:end])), None)
            if end is not None:
                yield start, end, name
            place = end or start + 1


def _ends(found: re.Match[str]) -> list[int]:
    """The end of a match and the ends of its groups of letters and digits, from the last one."""
    ends = {found.end(), *(found.start() + group.end() for group in _GROUP.finditer(found[0]))}
    return sorted(ends, reverse=True)


def _card(text: str) -> bool:
    """Groups of four digits or more, but for the last one, and the check digit (ISO/IEC 7812).

    Rows of short numbers and dates are left out: some part of them would fit the check digit.
    """
    if not re.fullmatch(r"(?:\d{4,}[ -])*\d+", text):
        return False
    digits = [int(c) for c in reversed(text) if c.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return 13 <= len(digits) <= 19 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _iban(text: str) -> bool:
    """The length in its country, if it is known, and the check digits (ISO 13616)."""
    plain = re.sub(r"\s", "", text).upper()
    if len(plain) != IBAN_LENGTHS.get(plain[:2], len(plain)):
        return False
    moved = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def _address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


_GROUP = re.compile(r"\w+")
# Characters of an account number by its country, from the registry of ISO 13616.
IBAN_LENGTHS = {
    entry[:2]: int(entry[2:])
    for entry in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 "
        "DJ27 DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 "
        "HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 "
        "MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 "
        "RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 "
        "VA22 VG24 XK20 YE30"
    ).split()
}
KINDS: dict[str, Kind] = {
    "email": Kind(re.compile(r"[\w.%+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")),
    "iban": Kind(re.compile(r"\b[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]){11,30}\b", re.ASCII), _iban),
    "card": Kind(re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)", re.ASCII), _card),
    "ip": Kind(
        re.compile(
            r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w)"  # a port may follow
            r"|(?<![\w.:])(?=:{0,2}[0-9a-fA-F])(?:[0-9a-fA-F]{0,4}:){2,8}[0-9a-fA-F]{0,4}"
            r"(?!:?\w|\.\d{1,3}\.\d)",
            re.ASCII,
        ),
        _address,
    ),
    "phone": Kind(  # 8 to 15 digits: ITU-T E.164 allows no more
        re.compile(r"(?<![\w+])(?:\+|(?=00[1-9]))\d(?:\)?[ /.-]?\(?\d){7,14}(?!\d)", re.ASCII)
    ),
}
