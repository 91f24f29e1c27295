"""Ten questions of readers, and where the report on a sequence of your own answers them.

Each stands with an id on the page and with what the answer there has to hold: numbers of the run. `test_report.py` builds a
page and looks each of them up. No answer needs the source.
"""

_COUNT = r"[\d,]+"
_NUMBER = r"[\d,.]+(e[+-]?\d+)?"

QUESTIONS = {
    "What was measured, and on what?": (
        "summary",
        rf"Three untrained networks of {_COUNT} units \(elman, gru, lstm\) read {_COUNT} sequences of {_COUNT} characters",
    ),
    "How far back does my lstm learn?": (
        "distance",
        rf"lstm: all but 1 % of the gradient comes from within {_COUNT} steps? of each loss, of {_COUNT}\.",
    ),
    "What would I change to make it reach further?": (
        "change",
        r"lstm: (start with `?lstm\(..., chrono_length=\d+\)|read longer sequences than \d+ steps|clip|feed)",
    ),
    "Which characters does the last loss depend on?": (
        "sequence",
        rf"lstm: half of the dependence of the last step's loss is on the last {_COUNT} steps?, 99 % on the last {_COUNT}\.",
    ),
    "Does the gradient vanish on its way back, and when?": (
        "reach",
        rf"gru: the gradient (falls below 1 % of its largest size {_COUNT} steps? back|reaches all {_COUNT} steps|grows)",
    ),
    "Why does it vanish?": (
        "why",
        rf"gru: the gradient (vanishes, mainly because of|stays within|explodes).* multiplies it by {_NUMBER} on average",
    ),
    "Is one cell better, or do their weights only start differently?": (
        "start",
        r"elman: W_hh starts as an orthogonal matrix, with 1.00 .*gru: the bias of its update gate starts at 1 .* 73 %",
    ),
    "At what K may I cut the gradient?": ("cut", rf"lstm (all )?{_COUNT} (all )?{_COUNT}"),
    "Can I trust the gradient?": (
        "methods",
        rf"All \d+ methods agree in all networks: the largest error is {_NUMBER}, and up to {_NUMBER} counts as rounding",
    ),
    "Which method takes the least memory, and which the least time?": (
        "costs",
        rf"milliseconds elman gru lstm scan( {_NUMBER}){{3}} .*KiB elman gru lstm scan( {_NUMBER}){{3}} ",
    ),
}
