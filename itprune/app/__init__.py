"""A local web page that asks one loaded model about pictures, and shows which patches it keeps.

    limits     how much one visitor, and all of them together, may ask for
    where      the part of it that each grid of visual tokens stands on
    kept       a trace as plain JSON: what each stage keeps
    streaming  an Answerer that tells each piece of an answer as it comes
    session    one model in memory, which answers one question at a time with any method that fits
    worker     the line before the model, and the thread that serves it
    policy     what a browser may do with the pages
    asking     an upload becomes a question, or a refusal of one sentence
    server     addresses and answers
    serving    uvicorn, until Ctrl-C
    static     the page: HTML, CSS and JavaScript as they are, without a build step

Nothing is written to disk, nothing is sent elsewhere, and no request is logged.
"""
