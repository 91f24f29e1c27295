"""Tables of numbers in text files, as people have them: `table` reads one, by way of the other modules in this order.

`lines` (the file), `cells` (numbers), `dates`, `headers`, `dialect` (the ways to read it), `body` (the one that fits all
rows), `columns`, `missing`.
"""
