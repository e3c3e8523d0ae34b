"""Plots: what a cache, a training or an evaluation says, as a picture and as numbers. Pictures need the `plots` extra.

plot.py           a plot: its numbers, and how they are drawn
open_plot.py      a plot by its name
read_rows.py      rows of a cache, evenly spread over it
kept_mass.py      how much of the teacher's probability the k largest entries hold
selections.py     bytes against error, for each selection that can be made of a cache
squared_error.py  the error of a selection, from what a cache knows of the teacher
entropy.py        how sure the teacher was: by position, and by document
curves.py         the curves of several trainings; those of two students on held-out rows
calibration.py    how often students are right when they say how sure they are

Guarantee: whatever is drawn stands in the numbers. What a cache cannot know is left out, and the numbers say so.
"""
