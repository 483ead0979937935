"""A program in Google's Model Explorer (`pip install "sparsify-compiler[explorer]"`), for people who have that viewer.

    model-explorer out.html --extensions=sparsify.show.explorer            a page that `sparsify inspect --html` wrote
    model_explorer.visualize_from_config(explorer_config(program))         from Python

`graphs.py` makes its graphs of the inspector's data; `main.py` is the adapter that Model Explorer loads.
"""
