"""Starts of commands, servers and engines without the imports: SGLang's seven thousand modules are ten seconds of
computing in each of three processes. Each process here is forked from one that has imported them and done nothing else.
"""
