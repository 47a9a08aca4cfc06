"""Token classes: labels of token positions along named axes. One axis a file; `axes.make_axis` knows them all.

An axis gives every position one small integer, a number in its list of class names. Axes are functions of a batch of
requests laid end to end (`batch.Batch`), so that a hundred million positions are labelled without a Python object each.
"""
