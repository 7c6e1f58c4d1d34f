"""What every server of ours needs, the page and the endpoint alike.

addresses   which of them reach this machine only
listening   the socket a server listens at, and who may reach it
connection  a connection that nobody can hold without asking for anything
guards      who may speak to a server
bodies      bodies of requests, up to a limit
pictures    a picture from a stranger, opened with care
texts       a text in which nothing is an image place
"""
