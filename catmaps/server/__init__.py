"""A run over HTTP, and the page that shows how its texts form.

`app`, `guard`, `http` and `schema` need the extra `serve`; the rest does not.
"""
