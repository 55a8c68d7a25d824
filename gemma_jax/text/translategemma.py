"""TranslateGemma: how it is asked for a translation (gemma3.md section 11; arXiv:2601.09012).

The texts stand in the checkpoints' template, which was not at hand; they are those that its independent ports agree on.
"""

import re
from dataclasses import dataclass
from typing import Any

KEYS = {"source_lang_code", "target_lang_code"}  # of a part that asks for a translation
# The template has names for the languages alone: a region or script behind the language does not change them.
_NAMES = """
aa Afar, ab Abkhazian, af Afrikaans, ak Akan, am Amharic, an Aragonese, ar Arabic, as Assamese, az Azerbaijani,
ba Bashkir, be Belarusian, bg Bulgarian, bm Bambara, bn Bengali, bo Tibetan, br Breton, bs Bosnian, ca Catalan,
ce Chechen, co Corsican, cs Czech, cv Chuvash, cy Welsh, da Danish, de German, dv Divehi, dz Dzongkha, ee Ewe, el Greek,
en English, eo Esperanto, es Spanish, et Estonian, eu Basque, fa Persian, ff Fulah, fi Finnish, fil Filipino,
fo Faroese, fr French, fy Western Frisian, ga Irish, gd Scottish Gaelic, gl Galician, gn Guarani, gu Gujarati, gv Manx,
ha Hausa, he Hebrew, hi Hindi, hr Croatian, ht Haitian, hu Hungarian, hy Armenian, ia Interlingua, id Indonesian,
ie Interlingue, ig Igbo, ii Sichuan Yi, ik Inupiaq, io Ido, is Icelandic, it Italian, iu Inuktitut, ja Japanese,
jv Javanese, ka Georgian, ki Kikuyu, kk Kazakh, kl Kalaallisut, km Central Khmer, kn Kannada, ko Korean, ks Kashmiri,
ku Kurdish, kw Cornish, ky Kyrgyz, la Latin, lb Luxembourgish, lg Ganda, ln Lingala, lo Lao, lt Lithuanian,
lu Luba-Katanga, lv Latvian, mg Malagasy, mi Maori, mk Macedonian, ml Malayalam, mn Mongolian, mr Marathi, ms Malay,
mt Maltese, my Burmese, nb Norwegian Bokmål, nd North Ndebele, ne Nepali, nl Dutch, nn Norwegian Nynorsk, no Norwegian,
nr South Ndebele, nv Navajo, ny Chichewa, oc Occitan, om Oromo, or Oriya, os Ossetian, pa Punjabi, pl Polish, ps Pashto,
pt Portuguese, qu Quechua, rm Romansh, rn Rundi, ro Romanian, ru Russian, rw Kinyarwanda, sa Sanskrit, sc Sardinian,
sd Sindhi, se Northern Sami, sg Sango, si Sinhala, sk Slovak, sl Slovenian, sn Shona, so Somali, sq Albanian,
sr Serbian, ss Swati, st Southern Sotho, su Sundanese, sv Swedish, sw Swahili, ta Tamil, te Telugu, tg Tajik, th Thai,
ti Tigrinya, tk Turkmen, tl Tagalog, tn Tswana, to Tonga, tr Turkish, ts Tsonga, tt Tatar, ug Uyghur, uk Ukrainian,
ur Urdu, uz Uzbek, ve Venda, vi Vietnamese, vo Volapük, wa Walloon, wo Wolof, xh Xhosa, yi Yiddish, yo Yoruba,
za Zhuang, zh Chinese, zu Zulu
"""
NAMES = {code: name for code, name in (entry.split(maxsplit=1) for entry in _NAMES.split(","))}


@dataclass(frozen=True)
class Language:
    """A code such as "de-AT", and the language's English name."""

    code: str
    name: str


def language(code: Any) -> Language:
    """The language of a code: "de", "de-DE", "zh-Hant", also with underscores. Raises ValueError for an unknown one."""
    written = code.strip().replace("_", "-") if isinstance(code, str) else ""
    name = NAMES.get(written.split("-")[0])
    if name is None or not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*", written):
        raise ValueError(f"there is no language {code!r:.60}; wanted a code such as 'de', 'pt-BR' or 'zh-Hant'")
    return Language(written, name)


def of_text(text: str, source: Language, target: Language) -> str:
    """What a user's turn says to have a text translated. Raises TypeError for what is no text."""
    if not isinstance(text, str):
        raise TypeError(f"there is a {type(text).__name__} to translate; wanted a text")
    return (
        f"{_task(source, target)}Produce only the {target.name} translation, without any additional explanations or "
        f"commentary. Please translate the following {source.name} text into {target.name}:\n\n\n{text.strip()}"
    )


def of_image(source: Language, target: Language) -> str:
    """What stands before an image to have the text in it translated."""
    return (
        f"{_task(source, target)}Please translate the {source.name} text in the provided image into {target.name}. "
        f"Produce only the {target.name} translation, without any additional explanations, alternatives or commentary. "
        "Focus only on the text, do not output where the text is located, surrounding objects or any other explanation "
        "about the picture. Ignore symbols, pictogram, and arrows!\n\n\n"
    )


def _task(source: Language, target: Language) -> str:
    return (
        f"You are a professional {source.name} ({source.code}) to {target.name} ({target.code}) translator. Your goal "
        f"is to accurately convey the meaning and nuances of the original {source.name} text while adhering to "
        f"{target.name} grammar, vocabulary, and cultural sensitivities.\n"
    )
