"""Update stamps in Redis: what keeps one server from undoing another's update.

Each partition has a hash of stamps: ``epoch``, its newest number; ``all``, a floor for
every key; and a field per bucket of keys, the number of the bucket's last write.
Numbers only grow. They are the server's time in microseconds, or one more than the
last number if that is larger, so that a replica which takes over with writes missing
does not give the same number twice.

Invariant: a row and the stamp of its bucket change in one transaction.

A server remembers the ``epoch`` of each partition from the replies to its own writes.
A lookup takes these numbers before it reads a lower tier; the rows it found there are
stored by a script that skips every key whose stamp is larger. Numbers that are out of
date only refuse more. A stamp may lie in the future: while a writer cannot change rows
and stamps in one transaction, such a *lease* refuses every backfill, and ends by itself
if the writer dies.
"""

from __future__ import annotations

N_BUCKETS = 1024  # per partition

LEASE_US = 30_000_000

_HEAD = """
local function now()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end
local function text(number) return string.format('%.0f', number) end
local function number(value) return tonumber(value or 0) end
local function restart(key, last)
  local epoch = math.max(now(), last + 1)
  redis.call('DEL', key)
  redis.call('HSET', key, 'epoch', text(epoch), 'all', text(epoch))
  return text(epoch)
end
"""

OPEN = (
    _HEAD
    + """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
return epoch or restart(KEYS[1], 0)
"""
)
"""Return a partition's number; begin one if there is none."""

STAMP = (
    _HEAD
    + """
local last = number(redis.call('HGET', KEYS[1], 'epoch'))
if last == 0 then restart(KEYS[1], 0) end
local epoch = math.max(now(), last + 1)
local stamp = text(epoch + tonumber(ARGV[2]))
redis.call('HSET', KEYS[1], 'epoch', text(epoch))
local buckets = ARGV[1]
if buckets == '' then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'epoch', text(epoch), 'all', stamp)
else
  local given = {}
  for i = 1, #buckets, 2 do
    given[#given + 1] = string.sub(buckets, i, i + 1)
    given[#given + 1] = stamp
    if #given >= 4000 then
      redis.call('HSET', KEYS[1], unpack(given))
      given = {}
    end
  end
  if #given > 0 then redis.call('HSET', KEYS[1], unpack(given)) end
end
return text(epoch)
"""
)
"""Stamp buckets (all, if none is given): buckets, lease in us -> the new number."""

BACKFILL = (
    _HEAD
    + """
local token, row_bytes, prefix = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local keys, buckets, rows, use = ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local last = number(redis.call('HGET', KEYS[1], 'epoch'))
if last < token or last == 0 then
  return {0, restart(KEYS[1], math.max(last, token))}
end
if number(redis.call('HGET', KEYS[1], 'all')) > token then return {0, text(last)} end
local fields = {}
for i = 1, #buckets, 2 do fields[#fields + 1] = string.sub(buckets, i, i + 1) end
local stamps = redis.call('HMGET', KEYS[1], unpack(fields))
local values, uses = {}, {}
for i = 1, #fields do
  if number(stamps[i]) <= token then
    local key = string.sub(keys, i * 8 - 7, i * 8)
    values[#values + 1] = prefix .. key
    values[#values + 1] = string.sub(rows, (i - 1) * row_bytes + 1, i * row_bytes)
    uses[#uses + 1] = key
    uses[#uses + 1] = use
  end
end
if #values == 0 then return {0, text(last)} end
if prefix == '' then
  redis.call('HSET', KEYS[2], unpack(values))
else
  redis.call('MSET', unpack(values))
end
if KEYS[3] then redis.call('HSET', KEYS[3], unpack(uses)) end
return {#values / 2, text(last)}
"""
)
"""Store rows whose keys were not written since ``token``.

KEYS: stamps; rows (any key of the slot, if rows are strings); and, if uses are noted,
their hash. ARGV: token, bytes of a row, prefix of row keys (empty if rows are fields),
keys, buckets, rows, and the use to note. Returns how many were stored, and the
partition's number.
"""
