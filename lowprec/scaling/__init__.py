"""Precision scaling laws: from a folder of runs to a decision with error bars.

    table   RunTable: one row a run            read     metrics.jsonl folders, CSV, W&B into a RunTable
    law     what a law is; its YAML file       laws/    one class a law
    fit     parameters, intervals, a verdict   compare  which law predicts best where it was not fitted
    advise  what to train, and with which bits report   one HTML page

Nothing here needs torch or imports another part of lowprec: it works on run folders, exports and tables alone.
"""
