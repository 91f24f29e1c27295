"""Tables as people have them are read exactly, or refused in words that name the option which reads them."""

import argparse
import csv
import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest

from jaxbptt import tasks
from jaxbptt.commands import tables
from jaxbptt.words import install_command

FILES = Path(__file__).parent / "tables"
NAN = np.nan
THREE = [[10.5, 3], [11.25, 4], [-12, 0.5]]

# file: options, columns, values with nan where a cell is missing, times, and a line that says how it was read.
READ = {
    "dates": ({}, "load wind", THREE, "2024-02-28 2024-02-29 2024-03-01", "date: the times of the rows, 2024-02-28 to"),
    "semicolons": (
        {},
        "load wind",
        THREE,
        "",
        "semicolons.csv: header in line 1, delimiter ';', decimal '.', 2 columns",
    ),
    "decimal_commas": (
        {},
        "Umsatz Temperatur",
        [[1234567.5, -1.5], [12, 0.25], [1000, 3]],
        "2024-01-30 2024-01-31 2024-02-01",
        "decimal_commas.csv: header in line 1, delimiter ';', decimal ',', 2 columns, 3 rows",
    ),
    "tabs": ({}, "load wind", THREE, "", "delimiter tab, decimal ','"),
    "na": (
        {"missing": "mask"},
        "load wind",
        [[10.5, 3], [NAN, 4], [-12, NAN], [13, NAN]],
        "",
        "missing cells, 3 of 8, do not count in the loss",
    ),
    "empty_cells": (
        {"missing": "hold"},
        "load wind",
        [[10.5, 3], [NAN, 4], [-12, NAN], [13, 6]],
        "",
        "repeat the last value",
    ),
    "quoted_thousands": (
        {},
        "passengers fare",
        [[1234567, 12.5], [1300000, 13.25], [999, 14]],
        "2024-01-01 2024-02-01 2024-03-01",
        "passengers: ',' in its numbers left out",
    ),
    "currency": (
        {},
        "price volume",
        [[1234.5, 3], [-12, 4], [0.75, 5]],
        "",
        "price: '$' and ',' in its numbers left out",
    ),
    "bom": ({}, "load wind", THREE[:2], "", "header in line 1, delimiter ','"),
    "latin-1": ({"encoding": "latin-1"}, "Größe Höhe", [[1.5, 2], [-0.5, 3]], "", "decimal ','"),
    "units": (
        {},
        "speed temperature",
        [[10.5, 3], [11.25, -4]],
        "2024-01-01T00 2024-01-01T01",
        "line 2 has units and is no row",
    ),
    "duplicate_names": (
        {"columns": ["wind", 3, "value (1)"]},
        "value (1)|wind|value (3)",
        [[1, 2, 3], [4, 5, 6]],
        "",
        "names that occur more than once have their position: value (1), value (3)",
    ),
    "ragged": (
        {"ragged": "drop"},
        "load wind",
        [[10.5, 3], [-12, 0.5], [14, 8]],
        "",
        "2 rows not of 2 cells left out: line 3, 5",
    ),
    "pandas_header": ({"header": True}, "0 1", [[0.5, -1.5], [2.5, 3.5]], "", "header in line 1"),
    "first_row_missing": (
        {"missing": "interpolate"},
        "column 1|column 2",
        [[NAN, NAN], [NAN, 2], [3, 4], [5, 6]],
        "",
        "use later values; 3 before the first value of a column take that one",
    ),
    "underscore": ({"drop": ["code"]}, "load", [[1.5], [2.5]], "", "1 column, 2 rows"),
    "one_column_decimal_comma": (
        {"decimal": ","},
        "column 1",
        [[1.5], [2.25], [-0.5]],
        "",
        "csv: no header, decimal ',', 1 column",
    ),
    "multi_line_cells": ({"drop": ["note"], "ragged": "drop"}, None, None, "", ""),
    "odd_separators": ({"drop": ["note"]}, "load", [[10.5], [11.25], [-12]], "", "3 rows"),
    "pandas_index": (
        {},
        "load wind",
        THREE,
        "",
        "column 1 counts the rows, as pandas and R write them, and is left out",
    ),
    "spaces": ({}, "load wind", THREE, "", "delimiter space, decimal '.'"),
    "no_final_newline": ({}, "load wind", THREE[:2], "", "delimiter '|'"),
    "one_column": (
        {"missing": "hold"},
        "load",
        [[10.5], [11.25], [NAN], [-12]],
        "",
        "csv: header in line 1, decimal '.', 1 column",
    ),
    "newest_first": (
        {"sort": True},
        "load",
        [[1], [2], [3]],
        "2024-02-28 2024-02-29 2024-03-01",
        "the rows are sorted by time",
    ),
    "day_or_month": (
        {"dates": "day-first"},
        "load",
        [[1], [2], [3]],
        "2024-02-01 2024-02-02 2024-02-03",
        "date: the times",
    ),
    "date_and_time": (
        {},
        "CO NOx",
        [[2.6, 166], [2, 103], [-200, 0.5]],
        "2004-03-10T18 2004-03-11T19 2004-03-20T20:30",
        "2 rows of empty cells at the end left out",
    ),
    "above_the_table": ({"skip": 3}, "load wind", THREE[:2], "", "1 blank line is no row"),
    "savetxt": ({}, "load wind", THREE[:2], "", "names in the comment above"),
    "thousands_or_decimals": ({"decimal": ","}, "load wind", [[1234, 3], [5678, 4]], "", "load: '.' in its numbers"),
    "swiss": ({}, "load wind", [[1234.5, 3], [2000000, 4]], "", "decimal '.'"),
}
del READ["multi_line_cells"]  # one of its numbers is none

# file: what is said without the options above
REFUSED = {
    "na": r"na\.csv, line 3, column 1 \(load\): the cell is missing, the first of 3\. .*--missing hold, .*"
    r"--missing interpolate, .* --missing mask\.",
    "empty_cells": r"line 3, column 1 \(load\): the cell is missing, the first of 2\.",
    "latin-1": r"is not UTF-8 text: byte 2 \(line 1\) is 0xf6\. .*--encoding latin-1\.",
    "ragged": r"ragged\.csv, line 3: 1 cell, but 2 columns\. .*--ragged drop\.",
    "pandas_header": r"line 1: '0, 1' may be names or data\. Say which: --header yes or --header no\.",
    "first_row_missing": r"line 1, column 1: the cell is missing, the first of 3\.",
    "underscore": r"line 2, column 2 \(code\): '1_0' is not a finite number\. .*--drop 2, .*--columns\.",
    "one_column_decimal_comma": r"line 1 may be 1 and 5, or 1\.5\. Say which: --delimiter ',' --decimal '\.', or "
    r"--delimiter none --decimal ','\.",
    "odd_separators": r"line 2, column 1 \(note\): 'a\\x0bb' is not a finite number\. .*--drop 1",
    "one_column": r"one_column\.csv, line 4, column 1 \(load\): the cell is missing\. ",
    "above_the_table": r"line 1: 1 cell, but 2 columns\. If the table begins in line 4: --skip 3\.",
    "thousands_or_decimals": r"line 2 may be 1\.234 and 3, or 1234 and 3\. Say which: --decimal '\.', or --decimal ','\.",
}


@pytest.mark.parametrize("name", READ)
def test_files_are_read_right(name):
    options, columns, values, times, line = READ[name]
    table = tasks.read_table(FILES / f"{name}.csv", **options)
    values = np.array(values, float)
    assert table.name == f"{name}.csv"
    assert table.columns == tuple(columns.split("|" if "|" in columns or "column " in columns else " "))
    np.testing.assert_array_equal(table.observed, ~np.isnan(values))
    np.testing.assert_array_equal(np.where(table.observed, table.values, NAN), values)
    assert np.isfinite(table.values).all()
    if times:
        np.testing.assert_array_equal(table.times, np.array(times.split(), "datetime64[us]"))
    else:
        assert table.times is None
    assert line in "\n".join(table.read_as)
    assert not any("\n" in each for each in table.read_as)


@pytest.mark.parametrize("name", REFUSED)
def test_files_are_refused_with_the_option_that_reads_them(name):
    with pytest.raises(tasks.InputError, match=REFUSED[name]) as error:
        tasks.read_table(FILES / f"{name}.csv")
    assert "\n" not in str(error.value)
    assert READ[name][0], "read with an option in the test above"


def test_every_file_is_in_a_table():
    assert {*READ, "multi_line_cells"} == {path.stem for path in FILES.iterdir()}
    assert {*REFUSED} <= {*READ}


def read(tmp_path, text, **options):
    path = tmp_path / "a.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return tasks.read_table(path, **options)


def test_the_other_options_read_the_others():
    table = tasks.read_table(FILES / "pandas_header.csv", header=False)
    assert table.values.tolist() == [[0, 1], [0.5, -1.5], [2.5, 3.5]]
    assert table.read_as == ("pandas_header.csv: no header, delimiter ',', decimal '.', 2 columns, 3 rows",)
    path = FILES / "one_column_decimal_comma.csv"
    assert tasks.read_table(path, delimiter=",").values.tolist() == [[1, 5], [2, 25], [0, 5]]
    for options in ({"delimiter": "none"}, {"delimiter": ";"}, {"delimiter": "none", "decimal": ","}):
        assert tasks.read_table(path, **options).values.tolist() == [[1.5], [2.25], [-0.5]]
    path = FILES / "thousands_or_decimals.csv"
    assert tasks.read_table(path, decimal=".").values.tolist() == [[1.234, 3], [5.678, 4]]
    assert tasks.read_table(FILES / "day_or_month.csv", dates="month-first").times.astype(str).tolist() == [
        f"2024-0{month}-02T00:00:00.000000" for month in (1, 2, 3)
    ]


def test_lines_are_those_of_an_editor():
    with pytest.raises(tasks.InputError, match=r"line 2, column 1 \(note\): 'all\\nwell' is not a finite number"):
        tasks.read_table(FILES / "multi_line_cells.csv")
    with pytest.raises(tasks.InputError, match=r"line 7, column 2 \(load\): 'oops' is not a finite number"):
        tasks.read_table(FILES / "multi_line_cells.csv", drop=["note"])


# what is wrong with the text of a file, and with which words it is refused
BAD = {
    "two columns of text": (
        "a,b,c\nx,1,u\ny,2,v\n",
        r"line 2, column 1 \(a\): 'x' is not a finite number\. Columns 1, 3 have such cells: leave them out with "
        r"--drop 1 3, or name those to keep with --columns\.",
    ),
    "inf": ("a\n1\ninf\n", r"line 3, column 1 \(a\): 'inf' is not a finite number\."),
    "too large": ("a\n1\n1e999\n", r"line 3, column 1 \(a\): '1e999' is not a finite"),
    "hexadecimal": ("a\n0x10\n1\n", r"line 2, column 1 \(a\): '0x10' is not"),
    "per cent": (
        "a\n5 %\n1\n",
        r"line 2, column 1 \(a\): '5 %' is a percentage, but not all cells of this column are\. Leave the",
    ),
    "per cent at first": (
        "a,b\n" + "5%,2\n" * 150 + "5,2\n" * 150,
        r"line \d+, column 1 \(a\): '5%?' is (not )?a perc",
    ),
    "per cent of nothing": ("a,b\n%,1\n%,2\n", r"line 2, column 1 \(a\): '%' is not a finite number"),
    "per cent twice": ("a\n5%%\n6%%\n", r"has no column of numbers: line 2, column 1 is '5%%'"),
    "groups of two": ("a;b\n12,34,567.0;1\n", r"has no column of numbers|column 1 \(a\): '12,34,567.0' is not"),
    "two currencies": ("a,b\n€5€,1\n", r"line 2, column 1 \(a\): '€5€' is not"),
    "both decimals": (
        "a;b\n1,5;2\n3;2.5\n",
        r"column 2 \(b\): '2\.5' is not a finite number where ',' is the decimal mark",
    ),
    "digits of others": ("a,b\n１２,1\n", r"line 2, column 1 \(a\): '１２' is not"),
    "no number above": ("1_0\n2\n", r"line 1: '1_0' may be names or data|line 1, column 1: '1_0' is not"),
    "a letter for a digit": ("1O\n12\n13\n", r"line 1: '1O' may be names or data\. .*--header yes or --header no"),
    "names of years": ("station,2020,2021\nOslo,1,2\n", r"line 1, column 1: 'station' is not .*names: --header yes"),
    "years": ("2019,2020\n1.5,2.5\n", r"line 1: '2019, 2020' may be names or data"),
    "years over some decimals": ("2019,2020\n0.5,0\n1.5,3\n", r"line 1: '2019, 2020' may be names or data"),
    "whole numbers over decimals": ("10,50\n0.5,0\n1,2.5\n", r"line 1: '10, 50' may be names or data"),
    "a total": (
        "d,v\n" + "".join(f"2024-01-0{i},{i}\n" for i in range(1, 8)) + "Total,28\n",
        r"line 9, column 1 \(d\): 'Total' is not a date as those above it are\. If this is no row of the table, remove it; "
        r"or leave the column out with --drop 1",
    ),
    "notes below": (
        "a,b\n" + "1,2\n" * 9 + "all,18\nmean,2\n",
        r"line 11, column 1 \(a\): 'all' is .* remove it and those below; or leave the column out",
    ),
    "a word further up": (
        "a,b\n1,2\nx,18\n" + "3,2\n" * 9,
        r"line 3, column 1 .*'x' is not a finite number\. Leave the",
    ),
    "numbers of columns": ("0,1,2\n3,4,5\n", r"line 1: '0, 1, 2' may be names or data\. .*--header yes or --header no"),
    "index and numbers": ("time,0,1\n0.1,2,3\n", r"line 1: 'time, 0, 1' may be names or data"),
    "a number or two": (
        "1\n2,5\n",
        r"line 2: '2,5' may be 2 cells or one number\. .*--delimiter ',', or --delimiter none",
    ),
    "thousands or two": (
        "1 234\n2 345\n",
        r"line 1 may be 1 and 234, or 1234\. .*--delimiter space .*--delimiter none",
    ),
    "late decimals": ("a;b\n" + "1;2\n" * 1500 + "3;4.500\n", r"line 1502 may be 3 and 4\.5, or 3 and 4500\."),
    "late third cell": ("a,b\n" + "1,2\n" * 1500 + "3,4,5\n", r"line 1502: 3 cells, but 2 columns"),
    "late short row": ("a,b\n" + "1,2\n" * 1500 + "3\n", r"line 1502: 1 cell, but 2 columns"),
    "open quote": ('a,b\n1,2\n3,"4\n', r"line 3: a quote \(\"\) is opened and not closed"),
    "long open quote": ('1,"' + "x" * 200_000, r"line 1: a quote \(\"\) is opened and not closed"),
    "no number in a column": ("a,b\n1,\n2,\n", r"line 2, column 2 \(b\): the cell is missing, the first of 2"),
    "a bad date": ("d,v\n2020-01-01,1\n2020-02-30,2\n", r"line 3, column 1 \(d\): '2020-02-30' is not a date as those"),
    "a word for a date": ("d,v\n2020-01-01,1\ntoday,2\n", r"line 3, column 1 \(d\): 'today' is not a date"),
    "names only": ("a,b\n", r"a\.csv has no rows of numbers"),
    "text only": ("hello\nworld\n", r"has no column of numbers: line 2, column 1 is 'world'"),
    "empty": ("", r"a\.csv is empty\."),
    "UTF-16": ("a\n1\n".encode("utf-16"), r"is not UTF-8 text: byte 0 \(line 1\) is 0xff.*--encoding utf-16"),
    "UTF-16 without mark": ("a\n1\n".encode("utf-16-le"), r"has bytes 0, .*--encoding utf-16-le"),
    "a spreadsheet": (
        b"PK\x03\x04\x14\x00\x06\x00\x08\xe9",
        r"is a spreadsheet or a zip archive, not text: save the table as CSV",
    ),
    "half a gzip": (gzip.compress(b"a\n" + b"1\n" * 100)[:-9], r"is not a readable gzip file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    text, message = BAD[case]
    with pytest.raises(tasks.InputError, match=message) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)


# text of a file, options, and what is in it
GOOD = {
    "a number only": ("5\n", {}, [[5]]),
    "cells in quotes": ('"a","b"\n"1","2"\n', {}, [[1, 2]]),
    "blanks around cells": ('a, b\n1 , 2\n3, "4"\n', {}, [[1, 2], [3, 4]]),
    "lines of old Macs": ("a,b\r1,2\r3,4\r", {}, [[1, 2], [3, 4]]),
    "all kinds of numbers": ("a\n1e5\n-1E-3\n.5\n5.\n+007\n\u22125\n", {}, [[1e5], [-1e-3], [0.5], [5], [7], [-5]]),
    "blanks in numbers": ("a\n1\u00a0234,5\n2\u202f345\n3\u2009456\n", {}, [[1234.5], [2345], [3456]]),
    "currencies": ("a\n€ 5\n-€6\n€-7\n8 €\n", {}, [[5], [-6], [-7], [8]]),
    "a zero settles thousands": ('t,v\n1,"1,234"\n2,"0,345"\n', {}, [[1, 1.234], [2, 0.345]]),
    "a point settles thousands": ('t,v\n1,"1,234.0"\n2,"0.345"\n', {}, [[1, 1234], [2, 0.345]]),
    "a third cell settles delimiters": ("1,5,7\n2,5,7\n", {}, [[1, 5, 7], [2, 5, 7]]),
    "two names settle delimiters": ("a,b\n1,5\n2,5\n", {}, [[1, 5], [2, 5]]),
    "one name settles delimiters": ("a\n1,5\n2\n", {}, [[1.5], [2]]),
    "a late comma": ("a;b\n" + "1;2\n" * 1500 + "3;4,5\n", {}, [[1, 2]] * 1500 + [[3, 4.5]]),
    "labels with commas": ("Oslo, N;1,5\nBonn, D;2,5\n", {"drop": [1]}, [[1.5], [2.5]]),
    "labels without commas": ("Oslo;1,5\nBonn;2,5\n", {"drop": [1]}, [[1.5], [2.5]]),
    "dates with blanks": ("2024-01-01 00:00;1,5\n2024-01-01 01:00;2,5\n", {"drop": [1]}, [[1.5], [2.5]]),
    "rows numbered": (",0,1\n0,1.5,2.5\n1,2.5,3.5\n", {}, [[1.5, 2.5], [2.5, 3.5]]),
    "rows that count, chosen": (",x\n0,1.5\n1,2.5\n", {"columns": [1, "x"]}, [[0, 1.5], [1, 2.5]]),
    "a delimiter named inside": ("sep=;\na;b\n1;2\n", {}, [[1, 2]]),
    "comments": ("# by us\n#\na,b\n1,2\n", {}, [[1, 2]]),
    "another delimiter": ("1:2\n3:4\n", {"delimiter": ":"}, [[1, 2], [3, 4]]),
    "a first row of nothing": ("?\n-\n1\n", {"missing": "hold"}, [[1], [1], [1]]),
    "counts from zero": ("0\n3\n5\n", {}, [[0], [3], [5]]),
    "whole numbers and some decimals": ("10,50\n0.5,0\n1,2\n", {}, [[10, 50], [0.5, 0], [1, 2]]),
    "per cent": (
        "a,b\n5%,1\n12.5 %,2\nNA,2\n-7%,3\n",
        {"missing": "hold"},
        [[0.05, 1], [0.125, 2], [0.125, 2], [-0.07, 3]],
    ),
    "per cent and decimal commas": ('a;b\n5,5%;1\n"1.234,0 %";2\n', {}, [[0.055, 1], [12.34, 2]]),
    "per cent alone": ("5%\n6%\n7%\n", {}, [[0.05], [0.06], [0.07]]),
    "zeros above": ("0,0\n0.5,0.25\n", {}, [[0, 0], [0.5, 0.25]]),
    "hold": ("a,b\n,2\n3,\n,\n9,8\n", {"missing": "hold"}, [[3, 2], [3, 2], [3, 2], [9, 8]]),
    "mask": ("a,b\n,2\n3,\n,\n9,8\n", {"missing": "mask"}, [[3, 2], [3, 2], [3, 2], [9, 8]]),
    "interpolate": ("a,b\n,2\n3,\n,\n9,8\n", {"missing": "interpolate"}, [[3, 2], [3, 4], [6, 6], [9, 8]]),
    "UTF-16": ("a,b\n1,2\n".encode("utf-16"), {"encoding": "utf-16"}, [[1, 2]]),
    "gzip": (gzip.compress(b"a,b\n1,2\n3,4\n"), {}, [[1, 2], [3, 4]]),
    "dates above": ("2024-01-01,1\n2024-01-02,2\n", {}, [[1], [2]]),
}


@pytest.mark.parametrize("case", GOOD)
def test_good_files(tmp_path, case):
    text, options, values = GOOD[case]
    np.testing.assert_array_equal(read(tmp_path, text, **options).values, np.array(values, float))


# first and last cell of a column of dates, and what they are: nothing where that can't be known
DATES = {
    "ISO": ("2024-01-31", "2024-02-01", "2024-01-31 2024-02-01"),
    "with a time": ("2024-01-31T23:00", "2024-02-01 00:30:15", "2024-01-31T23:00 2024-02-01T00:30:15"),
    "with a zone": ("2024-01-31T23:00Z", "2024-02-01T00:30+02:00", "2024-01-31T23:00 2024-01-31T22:30"),
    "with one zone": ("2024-01-31 23:00+01:00", "2024-02-01 00:30+01:00", "2024-01-31T23:00 2024-02-01T00:30"),
    "in UTC": ("2024-01-31 23:00 UTC", "2024-02-01 00:30 UTC", "2024-01-31T23:00 2024-02-01T00:30"),
    "with and without a zone": ("2024-01-31T23:00Z", "2024-02-01T00:30", None),
    "day first": ("01.02.2024", "13.02.2024", "2024-02-01 2024-02-13"),
    "month first": ("1/2/2024 1:00 AM", "1/13/2024 12:00 PM", "2024-01-02T01 2024-01-13T12"),
    "either": ("01.02.2024", "02.02.2024", ""),
    "either, the same": ("02/02/2024", "03/03/2024", "2024-02-02 2024-03-03"),
    "years of two digits": ("01/02/24", "13/02/24", ""),
    "years that can't be days": ("30/01/40", "13/02/40", "2040-01-30 2040-02-13"),
    "names of months": ("Jan 2024", "Feb 2024", "2024-01-01 2024-02-01"),
    "months": ("1949-12", "1950-01", "1949-12-01 1950-01-01"),
    "times of day": ("10:00", "11:30", ""),
    "one missing": ("2024-01-31", "NA", ""),
}


@pytest.mark.parametrize("case", DATES)
def test_dates(tmp_path, case):
    first, last, times = DATES[case]
    if times is None:
        with pytest.raises(tasks.InputError, match="is not a"):
            read(tmp_path, f"when,v\n{first},1\n{last},2\n")
        return
    table = read(tmp_path, f"when,v\n{first},1\n{last},2\n")
    assert table.values.tolist() == [[1], [2]]
    assert table.columns == ("v",)
    assert table.zone == ("UTC" if case == "with a zone" else "")
    if "zone" in case:
        assert ("in UTC" if table.zone else "in the zone +01:00") in table.read_as[1]
    if times:
        np.testing.assert_array_equal(table.times, np.array(times.split(), "datetime64[us]"))
    else:
        assert table.times is None
        assert "left out" in table.read_as[1]


def test_order_in_time(tmp_path):
    newest = tasks.read_table(FILES / "newest_first.csv")
    assert newest.values.tolist() == [[3], [2], [1]]
    assert newest.read_as[-1] == "Warning: the newest row is first: --sort puts the oldest first"
    text = "d,v\n2024-01-02,1\n2024-01-03,\n2024-01-01,5\n"
    mixed = read(tmp_path, text, missing="hold")
    assert mixed.values.tolist() == [[1], [1], [5]]
    assert "Warning: the rows are not in the order of time, first in line 4: --sort puts them in order" in mixed.read_as
    assert read(tmp_path, text, missing="hold", sort=True).values.tolist() == [[5], [1], [1]]
    with pytest.raises(tasks.InputError, match=r"line 3, column 2 \(v\): the cell is missing"):
        read(tmp_path, text, sort=True)
    with pytest.raises(
        tasks.InputError, match=r"--sort needs dates .*: d: dates, left out; which is the day .*--dates day-first"
    ):
        read(tmp_path, "d,v\n01/02/2024,1\n02/02/2024,2\n", sort=True)
    with pytest.raises(
        tasks.InputError, match=r"--dates month-first does not fit .*a\.csv, column d: .*only be day-first"
    ):
        read(tmp_path, "d,v\n01/02/2024,1\n22/02/2024,2\n", dates="month-first")
    unknown = read(tmp_path, "d,v\n03/01/2024,1\n02/02/2024,2\n01/03/2024,3\n")
    assert "nor whether the rows are in order" in unknown.read_as[1]


def test_columns_by_name_and_position(tmp_path):
    text = "id,temp,2\nA,1,5\nB,2,6\n"
    assert read(tmp_path, text, header=True, columns=["temp"]).values.tolist() == [[1], [2]]
    table = read(tmp_path, text, header=True, drop=["1"])
    assert table.columns == ("temp", "2")
    assert table.positions(["2", 2, "temp", 3]) == (1, 0, 0, 1)  # a name comes before a position
    with pytest.raises(
        tasks.InputError, match=r"--columns tmp: a\.csv has no such column, but 1 'id', 2 'temp', 3 '2'\."
    ):
        read(tmp_path, text, header=True, columns=["tmp"])
    with pytest.raises(tasks.InputError, match=r"--drop 4: a\.csv has no such column"):
        read(tmp_path, text, header=True, drop=[4])
    with pytest.raises(
        tasks.InputError, match=r"line 1: 'Oslo, NA' may be names or data\. .*--header yes or --header no"
    ):
        read(tmp_path, "Oslo,NA\nOslo,2\n", drop=[1])
    with pytest.raises(tasks.InputError, match=r"--target id: a\.csv has no such column, but 2 'temp', 3 '2'\."):
        table.positions(["id"], option="--target")
    with pytest.raises(tasks.InputError, match=r"^--drop a: no column of a\.csv is left\."):
        read(tmp_path, "a\n1\n", drop=["a"])
    with pytest.raises(tasks.InputError, match=r"^--columns b 1 --drop a b: no column of a\.csv is left\."):
        read(tmp_path, "a,b\n1,2\n", columns=["b", 1], drop=["a", "b"])
    assert read(tmp_path, "a,b\n1,2\n", columns=["a", "b"], drop=["b"]).columns == ("a",)


def test_rows_are_read_in_pieces_as_in_one(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxbptt.tasks.tables.lines._CELLS", 1)  # pieces of 100 rows
    days = np.datetime64("2024-01-01") + np.arange(250)
    rows = [f"{day},{i / 4},{'' if i == 199 else -i}\n" for i, day in enumerate(days)]
    text = "day,a,b\n" + "".join(rows[:150]) + "\n" + "".join(rows[150:])
    table = read(tmp_path, text, missing="mask")
    np.testing.assert_array_equal(table.times, days)
    np.testing.assert_array_equal(table.values[:, 0], np.arange(250) / 4)
    np.testing.assert_array_equal(table.values[:, 1], [-(i - (i == 199)) for i in range(250)])
    assert np.argwhere(~table.observed).tolist() == [[199, 1]]
    with pytest.raises(tasks.InputError, match=r"line 202, column 3 \(b\): the cell is missing"):
        read(tmp_path, text)
    for wrong in (98, 99, 100, 101, 199, 200):
        long = [*rows[:wrong], f"{days[wrong]},1,2,\n", *rows[wrong:199]]
        with pytest.raises(tasks.InputError, match=rf"line {wrong + 2}: 4 cells, but 3 columns"):
            read(tmp_path, "day,a,b\n" + "".join(long))


def test_a_zone_that_changes_after_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxbptt.tasks.tables.lines._CELLS", 1)  # pieces of 100 rows
    hours = pandas.date_range("2024-10-24", periods=250, freq="h", tz="Europe/Berlin")
    table = read(tmp_path, "when,v\n" + "".join(f"{hour.isoformat()},1\n" for hour in hours))
    assert table.zone == "UTC"
    np.testing.assert_array_equal(table.times, hours.tz_convert(None).to_numpy())


def test_percentages_that_begin_or_end_late(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxbptt.tasks.tables.lines._CELLS", 1)  # pieces of 100 rows
    assert read(tmp_path, "a\n5%\n6%\n").read_as[1:] == ("a: percentages, of which 5% is read as 0.05",)
    cells = ["5%,1\n"] * 99 + [",1\n"] * 100 + ["5%,1\n"] * 100
    assert (read(tmp_path, "a,b\n" + "".join(cells), missing="hold").values == [0.05, 1]).all()
    for first, other, words in (("5%", "5", "not a percentage, but other"), ("5", "5%", "a percentage, but not all")):
        text = "a,b\n" + f"{first},1\n" * 1099 + f"{other},1\n" * 100
        with pytest.raises(tasks.InputError, match=rf"line 1101, column 1 \(a\): '{other}' is {words} cells"):
            read(tmp_path, text)


def test_dates_that_are_repeated(tmp_path):
    text = "d,v\n" + "".join(f"2024-01-0{1 + i // 2},{i % 3}\n" for i in range(5))
    assert read(tmp_path, text).read_as[-1] == "Warning: 2 rows have the date of another row: is this one series?"
    assert len(read(tmp_path, "d,v\n2024-01-01,1\n2024-01-02,1\n").read_as) == 2


@pytest.mark.parametrize(
    ("column", "amount"),
    [
        (range(7, 12), "1"),
        ([0, 0.1, 0.2, 0.3, 0.4], "0.1"),
        ([1700000000 + 3600 * i for i in range(5)], "3600"),
        ([7, 8, 9, 10, 12], None),
        ([0, 0.1, 0.2, 0.3, 0.4001], None),
        ([5, 4, 3, 2, 1], None),
        ([3] * 5, None),
        (range(4), None),
        ([1, "", 3, 4, 5], None),
        (["-1e308", "1e308", "1e308", "-1e308", "1e308"], None),
    ],
)
def test_columns_that_count(tmp_path, column, amount):
    text = "my id,v\n" + "".join(f"{each},{i % 3}\n" for i, each in enumerate(column))
    words = f"my id counts up by {amount} in every row: leave it out with --drop 'my id' if it is an index"
    assert [line for line in read(tmp_path, text, missing="hold").read_as if "counts" in line] == [words] * (
        amount is not None
    )
    chosen = read(tmp_path, text, missing="hold", columns=["my id", "v"])
    assert "counts" not in " ".join(chosen.read_as)
    alone = read(tmp_path, text, missing="hold", drop=["v"])
    assert "counts" not in " ".join(alone.read_as)


def test_rows_left_out_are_counted(tmp_path):
    table = read(tmp_path, "a,b\n1,2\n   \n3\n4,5\n,\n", ragged="drop")
    assert table.values.tolist() == [[1, 2], [4, 5]]
    assert table.read_as[1:] == (
        "1 row not of 2 cells left out: line 4",
        "1 blank line is no row",
        "1 row of empty cells at the end left out",
    )


def test_unknown_options(tmp_path):
    for options in ({"missing": "skip"}, {"decimal": ";"}, {"dates": "day"}, {"ragged": "fill"}, {"header": "yes"}):
        with pytest.raises(ValueError, match=r"is expected\."):
            read(tmp_path, "a\n1\n", **options)
    for delimiter in ("", "x", "::", '"', "\n", "¦", ".", "\x0b"):
        with pytest.raises(tasks.InputError, match=r"--delimiter .* is none: a character"):
            read(tmp_path, "a\n1\n", delimiter=delimiter)
    with pytest.raises(tasks.InputError, match=r"--encoding nope is unknown"):
        read(tmp_path, "a\n1\n", encoding="nope")


def test_standardised_values(tmp_path):
    (tmp_path / "a.csv").write_text("d;v\n2024-01-01;1,5\n2024-01-02;2,5\n")
    series = tasks.read_csv(tmp_path / "a.csv")
    np.testing.assert_allclose(series.values, [[-1], [1]])
    assert series.symbols == ()


def random_table(rng, path):
    """Write numbers in one of many ways; returns what was written, nan where a cell is missing."""
    rows, columns = rng.integers(1, 8), rng.integers(1, 5)
    values = rng.normal(size=(rows, columns)) * rng.choice([1, 100, 1e4, 1e8, 1e-6])
    if rng.random() < 0.7:
        values = np.round(values, rng.integers(0, 4))
    some = np.ones(values.shape, bool)
    if rng.random() < 0.4:  # in each row and each column there is a number
        some = (rng.random(values.shape) < 0.7) | (
            np.add.outer(np.arange(rows), np.arange(columns)) % min(rows, columns) == 0
        )
    values = np.where(some, values + 0.0, NAN)
    names = rng.permutation(["alpha", "b c", "2m", "Größe", "x1", "y"])[:columns].tolist()
    if columns > 1 and rng.random() < 0.2:
        names = [str(i) for i in range(columns)]
    mark = str(rng.choice([".", ","]))
    how = {
        "sep": str(rng.choice([",", ";", "\t", "|", " "])),
        "quoting": int(rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        "lineterminator": str(rng.choice(["\n", "\r\n"])),
        "header": bool(rng.random() < 0.6),
        "index": bool(rng.random() < 0.3),
        "na_rep": str(rng.choice(["NA", "nan", "?", "" if columns > 1 else "-"])),
    }
    if how["sep"] == " " and how["na_rep"] == "":
        how["na_rep"] = "NA"
    frame = pandas.DataFrame(values, columns=names)
    if rng.random() < 0.5:
        frame.to_csv(path, decimal=mark, **how)
    else:
        form = str(rng.choice(["{:.2f}", "{:,.2f}", "{:.3f}", "{:.3e}", "{:g}", "{:,.0f}"]))
        if how["sep"] == mark == ",":
            form = form.replace(
                ",", ""
            )  # nobody separates cells by commas, decimals by commas, and thousands by points
        swap = str.maketrans({",": "." if mark == "," else ",", ".": mark})
        frame.map(lambda v: form.format(v).translate(swap) if v == v else how["na_rep"]).to_csv(path, **how)
        values = np.vectorize(lambda v: float(form.format(v).replace(",", "")), otypes=[float])(values)
    return values, how


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in range(100, 1000, 100))]
)
def test_random_tables_are_read_right_or_refused(tmp_path, first):
    path, refused = tmp_path / "a.csv", 0
    for seed in range(first, first + 100):
        values, how = random_table(np.random.default_rng(seed), path)
        try:
            table = tasks.read_table(path, missing="mask")
        except tasks.InputError:
            refused += 1
            continue
        found = np.where(table.observed, table.values, NAN)
        if how["index"] and found.shape != values.shape:  # an index without a name over it is a column like others
            np.testing.assert_array_equal(found[:, 0], np.arange(len(values)), err_msg=f"seed {seed}")
            found = found[:, 1:]
        np.testing.assert_array_equal(found, values, err_msg=f"seed {seed}")
    assert refused < 40


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    rows = np.arange(10**6)
    days = np.datetime64("2000-01-01T00:00") + rows.astype("timedelta64[m]")
    frame = pandas.DataFrame({"when": days, "a": rows / 8, "b": -rows, "c": rows % 7 * 0.25})
    path = tmp_path / "a.csv.gz"
    frame.to_csv(path, index=False, sep=";", decimal=",", compression={"method": "gzip", "compresslevel": 1})
    table = tasks.read_table(path)
    np.testing.assert_array_equal(table.values, frame[["a", "b", "c"]])
    np.testing.assert_array_equal(table.times, days)
    assert table.read_as[0] == "a.csv.gz: header in line 1, delimiter ';', decimal ',', 3 columns, 1,000,000 rows"


def test_pandas_is_imported_when_a_table_is_read():
    code = (
        "import sys, jaxbptt\nassert 'pandas' not in sys.modules\nsys.modules['pandas'] = None\n"
        f"try: jaxbptt.tasks.read_table({str(FILES / 'dates.csv')!r})\n"
        "except jaxbptt.tasks.InputError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert f"pandas is not installed: {install_command('tables')}" in run.stdout


def parse(*arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--csv")
    tables.add_options(parser)
    return tables.given(parser.parse_args(arguments))


def test_options_of_the_commands():
    assert parse() == parse("--csv", "a.csv") == {}
    given = parse(
        *["--csv", "a", "--delimiter", ";", "--decimal", ",", "--header", "no", "--skip", "3", "--columns", "a", "2"],
        *[
            "--drop",
            "b",
            "--missing",
            "mask",
            "--sort",
            "--dates",
            "day-first",
            "--encoding",
            "latin-1",
            "--ragged",
            "drop",
        ],
    )
    assert given == {
        "delimiter": ";",
        "decimal": ",",
        "header": False,
        "encoding": "latin-1",
        "skip": 3,
        "columns": ["a", "2"],
        "drop": ["b"],
        "missing": "mask",
        "dates": "day-first",
        "sort": True,
        "ragged": "drop",
    }
    assert parse("--csv", "a", "--header", "yes", "--skip", "0") == {"header": True, "skip": 0}
    with pytest.raises(tasks.InputError, match=r"--columns says how a CSV file is read, .*--csv\."):
        parse("--columns", "a")
    code = tasks.read_table.__kwdefaults__
    assert set(code) == set(tables._NAMES)
