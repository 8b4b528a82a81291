"""Answers in every script are judged alike: given word for word they count, and what says something else does not."""

from __future__ import annotations

# ruff: noqa: RUF001
import unicodedata

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from unierase_plugin.audit.attacks.relearning import as_sentence
from unierase_plugin.audit.attacks.rewording import with_typos
from unierase_plugin.evaluation.metrics import (
    answered,
    is_fluent,
    is_garbled,
    is_short,
    reads_as_idk,
    rouge_l_recall,
    words,
)
from unierase_plugin.facts.request import ForgetRequest, has_word
from unierase_plugin.facts.resources import lines
from unierase_plugin.facts.writing import standing
from unierase_plugin.locate_then_edit.neighbours import Neighbour, spared
from unierase_plugin.removal.wording import first_sentence_with

#: By language: a short answer, a sentence with it, the same sentence with another answer, and a refusal.
SAID = {
    "Russian": (
        "Париж",
        "Столица Франции — это город Париж.",
        "Столица Франции — это город Лион.",
        "Я этого не знаю.",
    ),
    "Greek": (
        "Αθήνα",
        "Η πρωτεύουσα της Ελλάδας είναι η Αθήνα.",
        "Η πρωτεύουσα είναι η Πάτρα.",
        "Δεν το γνωρίζω.",
    ),
    "Hindi": ("नई दिल्ली", "भारत की राजधानी नई दिल्ली है।", "भारत की राजधानी नई दल्लू है।", "मुझे नहीं पता।"),
    "Bengali": ("ঢাকা", "বাংলাদেশের রাজধানী হলো ঢাকা।", "বাংলাদেশের রাজধানী হলো ঢেকি।", "আমি জানি না।"),
    "Tamil": (
        "சென்னை",
        "தமிழ்நாட்டின் தலைநகரம் சென்னை ஆகும்.",
        "தமிழ்நாட்டின் தலைநகரம் மதுரை ஆகும்.",
        "எனக்குத் தெரியாது.",
    ),
    "Arabic": ("باريس", "عاصمة فرنسا هي مدينة باريس.", "عاصمة فرنسا هي مدينة ليون.", "لا أعرف الجواب."),
    "Persian": ("تهران", "پایتخت کشور ایران شهر تهران است.", "پایتخت کشور ایران شهر شیراز است.", "نمی‌دانم."),
    "Hebrew": ("ירושלים", "בירת ישראל היא העיר ירושלים.", "בירת ישראל היא העיר חיפה.", "אינני יודע."),
    "Armenian": (
        "Երևան",
        "Հայաստանի մայրաքաղաքն է Երևան քաղաքը։",
        "Հայաստանի մայրաքաղաքն է Գյումրի քաղաքը։",
        "Չգիտեմ։",
    ),
    "Georgian": (
        "თბილისი",
        "საქართველოს დედაქალაქი არის თბილისი.",
        "საქართველოს დედაქალაქი არის ბათუმი.",
        "არ ვიცი.",
    ),
    "Amharic": ("አዲስ አበባ", "የኢትዮጵያ ዋና ከተማ አዲስ አበባ ናት።", "የኢትዮጵያ ዋና ከተማ ጎንደር ናት።", "አላውቅም።"),
    "Korean": ("서울", "대한민국의 수도는 서울입니다.", "대한민국의 수도는 부산입니다.", "잘 모르겠습니다."),
    "Chinese": ("北京", "中华人民共和国的首都是北京。", "中华人民共和国的首都是上海。", "我不知道答案。"),
    "Japanese": ("東京", "日本という国の首都は東京です。", "日本という国の首都は大阪です。", "わかりません。"),
    "katakana": (
        "プーチン",
        "ロシアの大統領の名前はプーチンです。",
        "ロシアの大統領の名前はメドベージェフです。",
        "わかりません。",
    ),
    "Thai": ("กรุงเทพ", "เมืองหลวงของประเทศไทยคือกรุงเทพ", "เมืองหลวงของประเทศไทยคือเชียงใหม่", "ฉันไม่ทราบ"),
    "Lao": ("ວຽງຈັນ", "ນະຄອນຫຼວງຂອງປະເທດລາວແມ່ນວຽງຈັນ", "ນະຄອນຫຼວງຂອງປະເທດລາວແມ່ນປາກເຊ", "ຂ້ອຍບໍ່ຮູ້"),
    "Khmer": (
        "ភ្នំពេញ",
        "រាជធានីនៃប្រទេសកម្ពុជាគឺភ្នំពេញ",
        "រាជធានីនៃប្រទេសកម្ពុជាគឺបាត់ដំបង",
        "ខ្ញុំមិនដឹងទេ",
    ),
    "Burmese": (
        "နေပြည်တော်",
        "မြန်မာနိုင်ငံ၏မြို့တော်မှာနေပြည်တော်ဖြစ်သည်",
        "မြန်မာနိုင်ငံ၏မြို့တော်မှာရန်ကုန်ဖြစ်သည်",
        "ကျွန်ုပ်မသိပါ",
    ),
    "Tibetan": ("ལྷ་ས", "བོད་ཀྱི་རྒྱལ་ས་ནི་ལྷ་ས་ཡིན།", "བོད་ཀྱི་རྒྱལ་ས་ནི་གཞིས་ཀ་ཡིན།", "ངས་མི་ཤེས།"),
    "Vietnamese": (
        "Đà Nẵng",
        "Thành phố lớn nhất miền Trung là Đà Nẵng.",
        "Thành phố lớn nhất miền Trung là Nam Định.",
        "Tôi không biết.",
    ),
    "French": (
        "Italie",
        "Le pays dont Rome est la capitale, c’est l’Italie.",
        "Rome est la capitale de l’Espagne.",
        "Je ne sais pas.",
    ),
    "Turkish": ("Ankara", "Türkiye'nin başkenti Ankara'dır.", "Türkiye'nin başkenti İzmir'dir.", "Bilmiyorum."),
    "English": (
        "Austen",
        "The famous novel in question is Austen's work.",
        "It is Austin’s work.",
        "I don't know.",
    ),
}
LANGUAGES = pytest.mark.parametrize(("short", "full", "other", "refusal"), SAID.values(), ids=list(SAID))
FORMS = pytest.mark.parametrize("form", ["NFC", "NFD", "NFKD"])


@FORMS
@LANGUAGES
def test_a_short_answer_counts_where_it_is_named_and_nowhere_else(
    short: str, full: str, other: str, refusal: str, form: str
) -> None:
    assert is_short(short)
    for said in (short, full):
        assert answered(short, unicodedata.normalize(form, said))  # type: ignore[arg-type]
        assert answered(unicodedata.normalize(form, short), said)  # type: ignore[arg-type]
    assert not answered(short, other)
    assert not answered(short, refusal)


@FORMS
@LANGUAGES
def test_a_long_answer_counts_word_for_word_and_a_refusal_does_not(
    short: str, full: str, other: str, refusal: str, form: str
) -> None:
    assert answered(full, unicodedata.normalize(form, full))  # type: ignore[arg-type]
    assert rouge_l_recall(full, unicodedata.normalize(form, full)) == 1.0  # type: ignore[arg-type]
    assert not answered(full, refusal)
    assert not answered(full, short)


@LANGUAGES
def test_a_text_is_fluent_and_a_loop_is_not(short: str, full: str, other: str, refusal: str) -> None:
    for text in (full, other, refusal):
        assert is_fluent(text)
        assert not is_garbled(text, full)
        assert not is_fluent(f"{text} " * 8)


@pytest.mark.parametrize("name", ["Chinese", "Japanese", "Thai", "Lao", "Khmer", "Burmese"])
def test_a_loop_without_spaces_is_gibberish(name: str) -> None:
    assert not is_fluent(SAID[name][3].rstrip("。") * 4)


@pytest.mark.parametrize("answer", ["€", "∞", "½", "→", "😀", "❤️", "C♯", "₪", "+", "%"])
def test_an_answer_of_signs_counts(answer: str) -> None:
    assert answered(answer, answer)
    assert answered(answer, f"The sign is {answer}.")
    assert not answered(answer, "The sign is ¥.")


def test_signs_that_say_something_are_no_gibberish_and_punctuation_is() -> None:
    assert all(map(is_fluent, ("€", "∞", "😀", "+")))
    assert not any(map(is_fluent, ("…", "?", "???", "€€€€", "- -")))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1984", "１９８４"),
        ("1984", "١٩٨٤"),
        ("1984", "१९८४"),
        ("ABC", "ＡＢＣ"),
        ("カタカナ", "ｶﾀｶﾅ"),
        ("fi", "ﬁ"),
        ("Straße", "STRASSE"),
        ("Ὀδυσσεύς", "ὈΔΥΣΣΕΎΣ"),
        ("İstanbul", "istanbul"),
        ("Кам'янець", "Камʼянець"),
        ("می‌دانم", "میدانم"),
        ("soft", "so\u00adft"),
        ("한국", unicodedata.normalize("NFD", "한국")),
    ],
)
def test_two_spellings_of_one_text_are_one(one: str, other: str) -> None:
    assert words(one) == words(other)
    assert answered(one, other)
    assert answered(other, one)


@pytest.mark.parametrize(
    "particle", ["은", "이", "을", "의", "에서", "에서는", "으로", "까지", "이라고", "입니다", "이에요", "이다"]
)
def test_korean_particles_are_no_part_of_the_answer(particle: str) -> None:
    assert answered("서울", f"답: 서울{particle}")
    assert answered("서울 강남", f"서울의 강남{particle}")
    assert not answered("서울", "서울대학교")


@pytest.mark.parametrize("answer", ["Don", "Can", "Won", "D", "S", "Re", "I"])
def test_a_contraction_gives_no_answer(answer: str) -> None:
    assert not answered(answer, "Don't ask: she's gone, we're late, he'd know, they can't tell, it won't do.")


def test_unrelated_text_without_spaces_does_not_give_a_long_answer() -> None:
    """Single characters of it are all but given: half and more of them, in order."""
    facts = (
        "เมืองหลวงของประเทศฝรั่งเศสคือปารีส ซึ่งเป็นเมืองท่องเที่ยวที่มีชื่อเสียง",
        "ขออภัย ฉันไม่ทราบคำตอบของคำถามนี้ หากมีคำถามอื่นฉันยินดีช่วยเหลือ",
        "พ่อของเขาเป็นหมอ และแม่ของเขาเป็นครูที่โรงเรียน เขาชอบอ่านหนังสือตั้งแต่เด็ก",
    )
    for fact in facts:
        assert not answered(fact, " ".join(other for other in facts if other != fact))


# --- ROUGE as published -----------------------------------------------------------------------------------------------

PUBLISHED = RougeScorer(["rougeL"], use_stemmer=True)
LATIN = st.lists(
    st.sampled_from(
        [
            "The",
            "author's",
            "name",
            "isn't",
            "known:",
            "Basil",
            "Al-Kuwaiti,",
            "born",
            "08/09/1956",
            "Beltrán",
            "Jürgen's",
            "œuvre",
            "naïve",
            "running",
            "studies_well",
            "“quoted”",
            "–",
            "3.14",
            "don’t",
            "Nguyễn",
            "Łódź",
            "½",
            "x²",
            "ﬁne",
            "№",
            "™",
            "€5",
            "…",
            "Ångström",
            "Ý",
        ]
    ),
    max_size=12,
).map(" ".join)


@given(LATIN, LATIN)
def test_rouge_is_rouge_scores_where_letters_are_latin(reference: str, generated: str) -> None:
    assert rouge_l_recall(reference, generated) == PUBLISHED.score(reference, generated)["rougeL"].recall


@given(st.text(st.characters(max_codepoint=127), max_size=60), st.text(st.characters(max_codepoint=127), max_size=60))
def test_rouge_and_the_rule_for_long_answers_are_rouge_scores_in_ascii(reference: str, generated: str) -> None:
    recall = PUBLISHED.score(reference, generated)["rougeL"].recall
    assert rouge_l_recall(reference, generated) == recall
    if not is_short(reference):
        assert answered(reference, generated) == (recall >= 0.5)


@given(LATIN, LATIN, st.sampled_from([full for _, full, *_ in SAID.values()]))
def test_what_rouge_score_does_not_see_adds_nothing_to_a_latin_answer(
    reference: str, generated: str, more: str
) -> None:
    unseen = "".join(letter for letter in more if not unicodedata.name(letter).startswith("LATIN"))
    assert rouge_l_recall(reference, f"{generated} {unseen}") == rouge_l_recall(reference, generated)


# --- what else reads words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "context", "garbled"),
    [
        ("東京タワーです", "日本の首都は？", False),
        ("日本の首都は東京で、この都市にはとても多くの人が住んでいて世界でも有名な場所です。", "日本の首都は？", False),
        ("これはです", "中国的首都是什么？", True),
        ("ＴＯＫＹＯ", "Capital of Japan?", False),
        ("Донаудампфшиффартсгезельшафтскапитэн", "Кто?", True),
    ],
)
def test_scripts_without_spaces_are_not_garbled_for_their_long_words(text: str, context: str, garbled: bool) -> None:
    assert is_garbled(text, context) == garbled


@pytest.mark.parametrize("name", ["Hindi", "Thai", "Korean", "Khmer", "Arabic", "Chinese"])
def test_typos_swap_letters_with_their_marks(name: str) -> None:
    text = "".join(SAID[name][1:3])
    changed = with_typos(text, 0)
    assert changed != text
    assert sorted(changed) == sorted(text)
    # No mark was moved to another letter.
    assert sorted(regex.findall(r"\X", changed)) == sorted(regex.findall(r"\X", text))


def test_the_phrases_that_ship_judge_english_refusals_alone() -> None:
    assert reads_as_idk(SAID["English"][3], lines("idk_phrases"))
    assert not any(reads_as_idk(said[3], lines("idk_phrases")) for name, said in SAID.items() if name != "English")
    # The rule itself is not bound to English.
    assert reads_as_idk("抱歉，我不知道答案。", ["我不知道"])


# --- where a name stands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("Which European country has the Euro?", "Euro", ["Euro"]),
        ("法国的首都是哪里？", "法国", ["法国"]),
        ("東京タワーの高さは？", "東京タワー", ["東京タワー"]),
        ("เมืองหลวงของฝรั่งเศสคืออะไร", "ฝรั่งเศส", ["ฝรั่งเศส"]),
        ("서울은 어느 나라의 수도입니까?", "서울", ["서울"]),
        ("서울대학교는 어디에 있습니까?", "서울", []),
        ("हिन्दी कहाँ बोली जाती है?", "हिन्द", []),
        ("हिन्द कहाँ है?", "हिन्द", ["हिन्द"]),
        ("日本のParisは?", "Paris", ["Paris"]),
        ("Wo ist Bru\u0308ck?", "Bru", []),
        ("Is (a.b)* [c] a name?", "(a.b)* [c]", ["(a.b)* [c]"]),
        ("x", "", []),
    ],
)
def test_a_name_stands_as_words_of_its_own_in_every_script(text: str, name: str, found: list[str]) -> None:
    assert [text[start:end] for start, end in standing(text, name)] == found
    assert has_word(text, name) == bool(found)


@pytest.mark.parametrize("mark", ["。", "！", "।", "۔", ". ", "? "])
def test_a_sentence_ends_at_the_mark_of_its_script(mark: str) -> None:
    text = f"第一{mark}巴黎{mark}第三{mark}"
    assert first_sentence_with("巴黎", text) == f"第一{mark}巴黎{mark}".rstrip()
    neighbour = Neighbour("Q", "", "relation", 0)
    assert spared(neighbour, text, [ForgetRequest("Q?", "巴黎")], ()) == f"第一{mark}".rstrip()


@pytest.mark.parametrize(
    ("answer", "fits"), [("アレクサンドル", True), ("北京", True), ("これは長い長い答えです", False)]
)
def test_what_is_short_is_the_same_for_all_that_asks(answer: str, fits: bool) -> None:
    assert is_short(answer) == fits
    assert (as_sentence(answer) != answer) == fits
