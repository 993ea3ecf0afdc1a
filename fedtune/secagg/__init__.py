"""Secure aggregation: the coordinator learns the sum of the clients' integer vectors modulo 2^k, and no
single one. Bytes in, bytes out.

The protocol is that of Bonawitz et al. 2017, CCS, "Practical secure aggregation for privacy-preserving
machine learning" (ePrint 2017/281), Fig. 4 without the parts against an active adversary. In large cohorts
each client deals with few neighbours on a random graph, as in Bell et al. 2020, CCS, "Secure single-server
aggregation with (poly)logarithmic overhead" (ePrint 2020/704), semi-honest protocol. A client's
`vector + PRG(own seed) + sum of ± PRG(seed shared with a neighbour)` hides the vector; the masks between
neighbours cancel in the sum. The own seed and the key behind the pairwise seeds are shared (Shamir) among the
client and its neighbours, t of whom can give back one of the two, and never give both.

What is assumed

- The coordinator is honest but curious: it follows the protocol, keeps all it sees, and may pool it with some
  clients. It relays the clients' public keys. Nothing signs them, so **a coordinator that puts its own keys
  in their place, or makes up most of the clients, reads everything**: both are out of scope. One that says to
  some clients that a peer is there and to others that it is gone gets nothing from honest clients, since each
  gives one kind of share for a peer and t is more than half of those who hold them; together with clients
  that give it both kinds it can, and that is out of scope, too.
- Clients follow the protocol too. One that does not can make a round fail or spoil the sum (its own vector is
  unbounded modulo 2^k), but learns no other client's vector.
- The channel from client to coordinator is private and authenticated (TLS and the
  coordinator's list of devices).
- X25519, HKDF-SHA256, ChaCha20 and ChaCha20-Poly1305 are what they are taken for. Arithmetic on shares is by
  Python's integers, whose time depends on the values; Python does not erase memory: who reads a client's
  memory, or times it at close range, is out of scope.

What holds then

- Drop-outs at any time. The sum comes out if of every client that shared its seeds, at least t of the holders
  (the client and its neighbours; in a complete graph everyone) answer the last question. Otherwise the round
  fails and nothing is released.
- Collusion. The coordinator together with fewer than t of a client's holders learns the sum over the clients
  that do not collude, no more (in a sparse graph with the probability in `graph`: it must also stay in one
  piece without those who collude or are gone). That sum is itself information: if all but one collude, it is
  that one's vector. The sum says nothing about noise; differential privacy is another matter. Sums over two
  cohorts that differ by one client differ by its vector: no round is run twice with the same vectors.
- A client has a floor of its own, `minimum`: it takes part only where at least so many holders must answer
  before anything opens, hence only in sums of at least so many clients.
- Fresh keys in each round; every message, key and ciphertext is bound to session, round and pair,
  so what is replayed is refused.

Modules: `graph` who deals with whom; `client.ClientRound` and `server.ServerRound` with
`server.run_round`; `quantise` and `vectors` from floats to integers and back; `masks.sum_plainly`, the
same sum without any of this, for simulations.
"""
