"""Explorer: a cache as a page for a browser, in one file or served row by row.

token_texts.py    what a token reads like by itself
payload.py        rows and their targets as few bytes
compared.py       a student or another teacher's cache, laid beside the cache position by position
summary.py        what the page says of the whole cache
explorer.py       all of it for one cache: the head of the page and its rows
page.py           the page as one file
server.py         the same page over a whole cache, on this machine only
tints.py          by what a token is tinted, and in which colours
notebook.py       a cache, a row and a position as small pieces of HTML, for notebooks
page/             its parts: HTML, CSS, and plain JavaScript

Guarantee: texts of a cache or a corpus reach the page as data, never as markup, and characters that would change how
the text around them is read are spelt out.
"""
