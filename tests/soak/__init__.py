"""The load test: many clients at once do everything that the tree promises, for as long as you like.

    python -m tests.soak --seconds 600 --clients 64 --seed 1

Each client (``client``) has names of its own: it knows exactly what must be there (``model``) and what each call must answer
that makes, moves or removes a snapshot (``private``) or is about what is inside (``labels``, ``files``), and looks whether that
is so (``look``).  It meets all others at names that they share, where it knows what may happen (``shared``).  Meanwhile the
daemon's memory, descriptors and threads are sampled (``watch``), and at the end all that the clients know, what
``events`` and ``error_log`` told, the records and the directories on disk have to agree (``verdict``).
"""
