"""Kindle's "My Clippings.txt", hand-made in each documented language and form."""

from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from pipeline.errors import InputError
from pipeline.importers import kindle
from pipeline.importers.tables import Document, Event, Reject, Skipped

BERLIN = ZoneInfo("Europe/Berlin")


def record(label: str, text: str = "a passage", title: str = "The Ebb (Vera Tidewell)") -> str:
    return f"{title}\r\n{label}\r\n\r\n{text}\r\n==========\r\n"


def at(hour: int, place: str = "100-102") -> str:
    return (
        f"- Your Highlight on page 9 | location {place} | Added on Thursday, 22 August 2024 {hour:02}:00:00"
    )


def clippings(tmp_path: Path, *records: str, zone=UTC) -> list:
    path = tmp_path / "My Clippings.txt"
    path.write_bytes("".join(records).encode())
    return list(kindle.read(path, "ann", zone))


def events(items: list) -> list[Event]:
    return [item for item in items if isinstance(item, Event)]


# One moment, 22 August 2024 18:10:53, and one place as the device's languages write them.
LANGUAGES = {
    "English, United States": (
        "- Your {} on page 112 | Location 1300-1301 | Added on Thursday, August 22, 2024 6:10:53 PM",
        ("Highlight", "Note", "Bookmark"),
    ),
    "English, United Kingdom": (
        "- Your {} on page 112 | location 1300-1301 | Added on Thursday, 22 August 2024 18:10:53",
        ("Highlight", "Note", "Bookmark"),
    ),
    "English, India": (
        "- Your {} on Location 1300-1301 | Added on Thursday, 22 August, 2024 6:10:53 PM",
        ("Highlight", "Note", "Bookmark"),
    ),
    "German": (
        "- {} auf Seite 112 | bei Position 1300-1301 | Hinzugefügt am Donnerstag, 22. August 2024 18:10:53",
        ("Ihre Markierung", "Deine Notiz", "Ihr Lesezeichen"),
    ),
    "German of 2013": (
        "- {} Position 1300-1301 | Hinzugefügt am Donnerstag, 22. August 2024 um 18:10:53 Uhr",
        ("Ihre Markierung", "Ihre Notiz", "Ihr Lesezeichen"),
    ),
    "French": (
        "- {} sur la page 112 | emplacement 1300-1301 | Ajouté le jeudi 22 août 2024 18:10:53",
        ("Votre surlignement", "Votre note", "Votre signet"),
    ),
    "French of 2013": (
        "- {} Emplacement 1300-1301 | Ajouté le jeudi 22 août 2024 à 18:10:53",
        ("Votre surlignement", "Votre note", "Votre signet"),
    ),
    "Spanish": (
        "- {} en la página 112 | posición 1300-1301 | Añadido el jueves, 22 de agosto de 2024 18:10:53",
        ("La subrayado", "La nota", "El marcador"),
    ),
    "Italian": (
        "-  {} a pagina 112 | posizione 1300-1301 | Aggiunto in data giovedì 22 agosto 2024 18:10:53",
        ("La tua evidenziazione", "La tua nota", "Il tuo segnalibro"),
    ),
    "Italian of 2013": (
        "- {} a pagina 112 | Posizione 1300-1301 | Aggiunto il giovedì 22 agosto 24, 18:10:53",
        ("La mia evidenziazione", "Le mie note", "Il mio segnalibro"),
    ),
    "Portuguese": (
        "- {} na página 112 | posição 1300-1301 | Adicionado: quinta-feira, 22 de agosto de 2024 18:10:53",
        ("Seu destaque", "Sua nota", "Seu marcador"),
    ),
    "Dutch": (
        "- {} op pagina 112 | locatie 1300 t/m 1301 | Toegevoegd op donderdag 22 augustus 2024 18:10:53",
        ("Je highlight", "Je notitie", "Je bladwijzer"),
    ),
    "Russian": (
        "– {} на странице 112 | Место 1300–1301 | Добавлено: четверг, 22 августа 2024 г. в 18:10:53",
        ("Ваш выделенный отрывок", "Ваша заметка", "Ваша закладка"),
    ),
    "Japanese": (
        "- 112ページ|位置No. 1300-1301の{} |作成日: 2024年8月22日木曜日 18:10:53",
        ("ハイライト", "メモ", "ブックマーク"),
    ),
    "Japanese of 2013": (
        "- {} ページ112 | 位置No. 1300-1301 | 追加日： 2024年8月22日 (木曜日) 18:10:53",
        ("ハイライト", "メモ", "ブックマーク"),
    ),
    "Chinese": (
        "- 您在第 112 页（位置 #1300-1301）的{} | 添加于 2024年8月22日星期四 下午6:10:53",
        ("标注", "笔记", "书签"),
    ),
    "Chinese of 2013": (
        "- 我的{} 第112页 | 位置1300-1301 | 已添加至 2024年8月22日 星期四 18:10:53",
        ("标注", "笔记", "书签"),
    ),
    "Russian words around an English date": (
        "– {} в месте 1300–1301 | Добавлено: Thursday, August 22, 2024 в 6:10:53 PM",
        ("Ваш выделенный отрывок", "Ваша заметка", "Ваша закладка"),
    ),
}


@pytest.mark.parametrize(("label", "kinds"), LANGUAGES.values(), ids=LANGUAGES)
def test_a_highlight_is_an_event_and_notes_and_bookmarks_are_skipped_in_every_language(
    tmp_path, label, kinds
):
    highlight, note, bookmark = (label.format(kind) for kind in kinds)
    items = clippings(tmp_path, record(highlight), record(note, "mine"), record(bookmark, ""), zone=BERLIN)
    assert items == [
        Document("book:the ebb|tidewell vera", "The Ebb", "The Ebb - Vera Tidewell"),
        # summer time in Berlin is two hours before UTC
        Event(
            "ann", "book:the ebb|tidewell vera", datetime(2024, 8, 22, 16, 10, 53, tzinfo=UTC), "a passage"
        ),
        Skipped(6, "note"),
        Skipped(11, "bookmark"),
    ]


@pytest.mark.parametrize(("label", "kinds"), LANGUAGES.values(), ids=LANGUAGES)
def test_the_location_is_read_in_every_language(tmp_path, label, kinds):
    # the same words at 1300-1301 and, as another record says in English, at 1301: they overlap
    english = "- Your Highlight on Location 1301 | Added on Thursday, August 22, 2024 6:11:00 PM"
    items = clippings(
        tmp_path, record(label.format(kinds[0])), record(english, "a passage that was extended")
    )
    assert Skipped(1, "edited") in items


@pytest.mark.parametrize(
    ("stamp", "wanted"),
    [
        ("Added on Sunday, September 05, 2021, 04:39 PM", (2021, 9, 5, 16, 39, 0)),
        ("Added on Monday, August 3, 2026 12:00:00 AM", (2026, 8, 3, 0, 0, 0)),
        ("Added on Monday, August 3, 2026 12:30:00 PM", (2026, 8, 3, 12, 30, 0)),
        ("Added on Tuesday, September 1, 2026 9:04:11\u202fPM", (2026, 9, 1, 21, 4, 11)),  # a narrow space
        ("Hinzugefügt am Freitag, 1. März 2013 um 23:38:23.1 Uhr", (2013, 3, 1, 23, 38, 23)),
        ("Ajouté le lundi 1er janvier 2024 08:05:06", (2024, 1, 1, 8, 5, 6)),
        ("Añadido el sábado, 12 de octubre de 2019 0:37:31", (2019, 10, 12, 0, 37, 31)),
        ("Añadido el jueves, 22 de agosto de 2024 6:10:53 p. m.", (2024, 8, 22, 18, 10, 53)),
        ("Adicionado na data segunda-feira, 17 de junho de 2013, 20:39:30", (2013, 6, 17, 20, 39, 30)),
        ("添加于 2019年11月11日星期一 上午12:26:17", (2019, 11, 11, 0, 26, 17)),
    ],
)
def test_a_time_without_a_zone_is_read(stamp, wanted):
    assert kindle.moment(stamp) == datetime(*wanted)


@pytest.mark.parametrize(
    ("stamp", "wanted"),
    [  # the first generations wrote a zone, some a minute off
        ("Added on Friday, 6 July 12 08:40:41 GMT+01:00", (2012, 7, 6, 7, 40, 41)),
        ("Added on Tuesday, 4 December 12 19:50:33 Greenwich Mean Time", (2012, 12, 4, 19, 50, 33)),
        ("Hinzugefügt am Sonntag, 27. September 2020 6.05 Uhr GMT+07:29", (2020, 9, 26, 22, 36, 0)),
        ("Añadido el martes 2 de octubre de 2012 18H36' GMT+01:59", (2012, 10, 2, 16, 37, 0)),
        ("Data de adição: quarta-feira, 20 de março de 2019 22h31min07s GMT-03:00", (2019, 3, 21, 1, 31, 7)),
        ("Added on 2013年8月6日 星期二 上午09时12分27秒 GMT+08:00", (2013, 8, 6, 1, 12, 27)),
    ],
)
def test_a_time_with_a_zone_needs_no_other(stamp, wanted):
    assert kindle.moment(stamp) == datetime(*wanted, tzinfo=UTC)


@pytest.mark.parametrize(
    "stamp",
    [
        "",
        "Added on Thursday",
        "Added on Thursday, 22 August 2024",  # a day is no time
        "Added on Thursday, 31 February 2024 10:00:00",
        "Added on Thursday, 22 August 2024 25:00:00",
        "Added on Thursday, January 1, 1970 0:01:00 AM",  # a clock that was reset
        "Added on Thursday, 22 Augusti 2024 10:00:00",
        "Added on Friday, 6 July 12 07:37:42 GMT+99:00",
    ],
)
def test_a_time_that_cannot_be_is_rejected(tmp_path, stamp):
    label = f"- Your Highlight on page 1 | location 5-6 | {stamp}"
    assert clippings(tmp_path, record(label)) == [Reject(1, "bad_timestamp", stamp)]


def test_a_month_name_means_one_month_in_all_languages():
    meanings = {(name, month) for names in kindle.MONTH_NAMES for month, name in enumerate(names.split(), 1)}
    assert all(len(names.split()) == 12 for names in kindle.MONTH_NAMES)
    assert len(meanings) == len(kindle.MONTHS)


def test_no_word_of_one_kind_stands_in_a_word_of_another():
    words = [(kind, word) for kind, words in kindle.KINDS.items() for word in words]
    assert not [(a, b) for kind, a in words for other, b in words if kind != other and a in b]


def test_a_time_without_a_zone_is_rejected_where_none_is_given(tmp_path):
    [reject] = clippings(tmp_path, record(at(10)), zone=None)
    assert (reject.line, reject.reason) == (1, "timestamp_without_zone")


@pytest.mark.parametrize(
    ("local", "utc_hour", "utc_minute"),
    [
        ("Sunday, 27 October 2024 02:30:00", 0, 30),  # twice on that night: the earlier, still summer time
        ("Sunday, 31 March 2024 02:30:00", 1, 30),  # never: the offset before the change, UTC+1
    ],
)
def test_times_at_a_change_of_clocks_are_the_earlier_reading(tmp_path, local, utc_hour, utc_minute):
    label = f"- Your Highlight at location 1-2 | Added on {local}"
    [event] = events(clippings(tmp_path, record(label), zone=BERLIN))
    assert (event.timestamp.hour, event.timestamp.minute) == (utc_hour, utc_minute)


def test_byte_order_marks_and_either_line_end_change_nothing(tmp_path):
    plain = clippings(tmp_path, record(at(10)), record(at(11, "200-201"), "another"))
    marked = clippings(tmp_path, "\ufeff" + record(at(10)), "\ufeff" + record(at(11, "200-201"), "another"))
    unix = clippings(tmp_path, (record(at(10)) + record(at(11, "200-201"), "another")).replace("\r", ""))
    assert plain == marked == unix
    assert len(events(plain)) == 2


def test_a_book_is_described_once(tmp_path):
    items = clippings(tmp_path, record(at(10)), record(at(11, "200-201"), "another"))
    assert [type(item) for item in items] == [Document, Event, Event]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("100-101", "the sea"), ("100-104", "the sea was level")),  # extended
        (("100-104", "the sea was level"), ("100-101", "the sea")),  # shortened
        (("100-104", "was level"), ("102-108", "was level with the quay")),
    ],
)
def test_an_edited_highlight_is_replaced_by_the_last_one(tmp_path, first, second):
    items = clippings(tmp_path, record(at(10, first[0]), first[1]), record(at(11, second[0]), second[1]))
    assert items[0] == Skipped(1, "edited")
    assert [event.text for event in events(items)] == [second[1]]


def test_an_edit_is_found_across_other_highlights_and_edits(tmp_path):
    items = clippings(
        tmp_path,
        record(at(10, "95-101"), "the sea"),
        record(at(11, "900-901"), "elsewhere"),
        record(at(12, "95-305"), "the sea was"),
        record(at(13, "95-101"), "the sea"),  # back again: the last one counts
    )
    assert [item.line for item in items if item == Skipped(item[0], "edited")] == [1, 11]
    assert [(event.text, event.timestamp.hour) for event in events(items)] == [
        ("elsewhere", 11),
        ("the sea", 13),
    ]


def test_the_same_words_at_the_same_place_count_once(tmp_path):
    items = clippings(tmp_path, record(at(10)), record(at(11)))
    assert [event.timestamp.hour for event in events(items)] == [10]
    assert items[-1] == Skipped(6, "repeated")


@pytest.mark.parametrize(
    "other",
    [
        record(at(11, "500-501"), "the sea was"),  # elsewhere in the book
        record(at(11), "the sea was", title="The Flood (Vera Tidewell)"),  # in another book
        record(at(11), "the sky"),  # neither contains the other
    ],
)
def test_what_is_no_edit_stays(tmp_path, other):
    assert len(events(clippings(tmp_path, record(at(10), "the sea"), other))) == 2


def test_older_firmware_shortens_the_end_of_a_range(tmp_path):
    # 2919-28 is 2919 to 2928, so that 2927 lies in it
    first = "- Highlight Loc. 2919-28  | Added on Sunday, September 05, 2021, 04:39 PM"
    second = "- Highlight Loc. 2927  | Added on Sunday, September 05, 2021, 04:41 PM"
    items = clippings(tmp_path, record(first, "rise"), record(second, "rise with the moon"))
    assert items[0] == Skipped(1, "edited")


def test_pages_in_roman_numerals_are_compared_as_written(tmp_path):
    def on(page, text):
        return record(f"- Your Highlight on page {page} | Added on Monday, April 18, 2016 7:28:27 AM", text)

    items = clippings(tmp_path, on("xvi-xvi", "the mind"), on("xvi-xvi", "the mind of"), on("xvii", "the"))
    assert items[0] == Skipped(1, "edited")
    assert [event.text for event in events(items)] == ["the mind of", "the"]


@pytest.mark.parametrize(
    "message",
    [
        "<You have reached the clipping limit for this item>",
        " <您已达到本内容的剪贴上限>",
        "<このアイテムのクリップの上限に達しました>",
        "<Vous avez atteint la limite maximale d'extraits pour cet article>",
    ],
)
def test_a_passage_beyond_the_clipping_limit_is_skipped(tmp_path, message):
    assert clippings(tmp_path, record(at(10), message)) == [Skipped(1, "clipping_limit")]


def test_a_passage_cut_by_the_clipping_limit_keeps_its_words(tmp_path):
    text = "The first words <You have reached the clipping limit set by the publisher>"
    [event] = events(clippings(tmp_path, record(at(10), text)))
    assert event.text == "The first words"


def test_a_passage_of_markup_is_not_taken_for_the_limit(tmp_path):
    [event] = events(clippings(tmp_path, record(at(10), '<div class="page">')))
    assert event.text == '<div class="page">'


@pytest.mark.parametrize("kind", ["Underline", "Circle", "Asterisk"])
def test_the_marks_of_firmware_5_19_are_highlights(tmp_path, kind):
    label = f"- Your {kind} on Location 5-6 | Added on Wednesday, September 2, 2026 8:12:30\u202fAM"
    assert len(events(clippings(tmp_path, record(label)))) == 1


def test_an_article_clipped_whole_is_skipped(tmp_path):
    label = "- Clip This Article at location 5 | Added on Wednesday, September 2, 2026 8:12:30 AM"
    assert clippings(tmp_path, record(label, "a whole article")) == [Skipped(1, "article_clipping")]


def test_a_highlight_without_words_is_skipped(tmp_path):
    assert clippings(tmp_path, record(at(10), "")) == [Skipped(1, "empty_highlight")]


def test_a_passage_of_several_paragraphs_keeps_them(tmp_path):
    [event] = events(clippings(tmp_path, record(at(10), "One.\r\n\r\nTwo.")))
    assert event.text == "One.\n\nTwo."


def test_a_language_that_is_not_known_is_rejected_and_named(tmp_path):
    label = "- Sinun korostuksesi sivulla 5 | Lisätty torstai 22. elokuuta 2024 18:10:53"
    assert clippings(tmp_path, record(label)) == [Reject(1, "unknown_kind", label)]


def test_what_is_no_record_is_rejected_and_the_next_one_read(tmp_path):
    # a passage that holds the separator itself ends there, and its rest is no record
    items = clippings(tmp_path, record(at(10), "above\r\n==========\r\nbelow"), record(at(11, "7"), "next"))
    assert [item.text for item in events(items)] == ["above", "next"]
    assert [(item.line, item.reason) for item in items if isinstance(item, Reject)] == [(6, "not_a_clipping")]


def test_a_record_in_another_encoding_is_rejected(tmp_path):
    path = tmp_path / "My Clippings.txt"
    path.write_bytes(record(at(10)).encode() + record(at(11, "7"), "caf\xe9").encode("latin-1"))
    items = list(kindle.read(path, "ann", UTC))
    assert len(events(items)) == 1
    assert [(item.line, item.reason) for item in items if isinstance(item, Reject)] == [(6, "not_utf_8")]


def test_the_last_record_is_read_without_its_separator(tmp_path):
    items = clippings(tmp_path, record(at(10)), record(at(11, "7"), "last").removesuffix("==========\r\n"))
    assert [item.text for item in events(items)] == ["a passage", "last"]


@pytest.mark.parametrize(
    ("line", "title", "author"),
    [
        ("The Ebb (Vera Tidewell)", "The Ebb", "Vera Tidewell"),
        ("潮（上下） (海洋丛书) ((日)林田)", "潮（上下） (海洋丛书)", "(日)林田"),
        ("Design (3rd ed.) (Ro Willow (Editor))", "Design (3rd ed.)", "Ro Willow (Editor)"),
        (
            "Flour, Salt, Yeast (A Baker's Year)  ",
            "Flour, Salt, Yeast (A Baker's Year)",
            "",
        ),
        ("The (Big) Book", "The (Big) Book", ""),
        ("report-final(2)", "report-final(2)", ""),
        ("(All in brackets)", "(All in brackets)", ""),
        ("Torn) (Author", "Torn) (Author", ""),
    ],
)
def test_the_author_is_the_last_bracket(tmp_path, line, title, author):
    [document] = [
        item for item in clippings(tmp_path, record(at(10), title=line)) if isinstance(item, Document)
    ]
    assert (document.title, document.text) == (title, f"{title} - {author}" if author else title)


@pytest.mark.parametrize(
    ("title", "author"),
    [
        ("The Ebb", "Tidewell, Vera"),
        ("THE  EBB", "vera tidewell"),
        ("The Ebb (English Edition)", "Vera Tidewell"),
        ("The Ebb (Kindle Edition)", "Vera Tidewell"),
    ],
)
def test_readers_meet_on_a_book_however_their_devices_write_it(title, author):
    assert kindle.book(title, author).document_id == "book:the ebb|tidewell vera"


def test_several_authors_are_the_same_in_any_order():
    ids = {
        kindle.book("Soil", authors).document_id
        for authors in (
            "Field, Kim;Brook, Lou",
            "Lou Brook and Kim Field",
            "Lou Brook & Kim Field",
        )
    }
    assert ids == {"book:soil|brook field kim lou"}


def test_books_of_the_same_title_by_others_stay_apart():
    ids = {kindle.book("Salt", author).document_id for author in ("Ann Quill", "Bo Marsh", "")}
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"Dear diary,\ntoday I read\n", "it begins with 'Dear diary,'"),
        ("The Ebb\r\n- Your\r\n==========".encode("utf-16"), "wanted .* as UTF-8"),
        (b"1\n2\n==========\n", "none of its records"),
    ],
)
def test_a_file_that_is_no_clippings_file_is_refused(tmp_path, content, said):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as raised:
        list(kindle.read(path, "ann", UTC))
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_numbers_of_any_length_do_no_harm(tmp_path):
    items = clippings(tmp_path, record(at(10, "9" * 5000)), record(at(11, f"1-{'9' * 9}"), "another"))
    assert len(events(items)) == 2


def test_highlights_side_by_side_all_stay(tmp_path):
    many = [record(at(10, f"{3 * n}-{3 * n + 2}"), f"passage {n:05}") for n in range(5_000)]
    assert len(events(clippings(tmp_path, *many))) == 5_000
