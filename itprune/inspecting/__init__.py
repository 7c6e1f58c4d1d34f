"""Inspecting: what a pruner kept of pictures and prompts, as pictures and one HTML page.

    places   where the visual tokens of one question stand on its pictures
    looking  one question: what each stage left, scores, dense and pruned answer
    words    the prompt's tokens, and the layer each leaves before
    rules    where each inflection rule would have cut the score curve
    costs    tokens and FLOPs of each LLM layer
    shading  kept patches bright, dropped ones dim
    charts   bars and curves as inline SVG
    page     the HTML page
    folder   the output folder, and which files in it are ours
    run      the order of it all

Nothing here knows a method: all comes from the trace of a forward, the report and the tokens.
"""
