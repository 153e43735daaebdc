"""Update stamps in Redis: what keeps one server from undoing another's update.

Each partition has a hash of stamps: ``epoch``, its newest number; ``all``, a floor for
every key; and a field per bucket of keys, the number of the bucket's last write. A
write of many keys raises the floor instead of most buckets. Numbers only grow. They are
the server's time in microseconds, or one more than the last number if that is larger,
so that a replica which takes over with writes missing does not give the same number
twice, as long as its clock is behind by less than taking over takes.

Invariant: a row and the stamp of its bucket change in one transaction.

The same hash has in ``stream`` how far the rows follow the table's update stream, see
``stream_scripts``: `` <partition>=<offset>:<record>`` of each of its partitions.

A server remembers the ``epoch`` of each partition from the replies to its own writes,
as far as ``tokens`` allows. A lookup takes these numbers before it reads a lower tier;
the rows it found there are stored by a script that skips every key whose stamp is
larger. Numbers that are out of date only refuse more. Stamps that are gone, because
memory was short or a replica without them took over, refuse all numbers of before.

While a writer cannot change rows and stamps in one transaction, a *lease*, a floor in
the future, refuses every backfill. A load has one in ``loading`` and ends it. Writers
to a slot that is being moved share theirs, in ``moving``, so nobody ends it: it passes
by itself, as does that of a load that died.
"""

from __future__ import annotations

N_BUCKETS = 1024  # per partition

LEASE_US = 30_000_000

HEAD = """
local function now()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end
local function text(number) return string.format('%.0f', number) end
local function number(value) return tonumber(value or 0) end
local function seen(key, epoch)
  return {text(epoch), redis.call('HGET', key, 'stream') or ''}
end
local function restart(key, last)
  local epoch = math.max(now(), last + 1)
  redis.call('HSET', key, 'epoch', text(epoch), 'all', text(epoch))
  return epoch
end
local function stamp(key, buckets)
  local last = number(redis.call('HGET', key, 'epoch'))
  if last == 0 then restart(key, 0) end
  local epoch = math.max(now(), last + 1)
  local given = {'epoch', text(epoch)}
  if buckets == '' then given[3], given[4] = 'all', given[2] end
  for i = 1, #buckets, 2 do
    given[#given + 1] = string.sub(buckets, i, i + 1)
    given[#given + 1] = given[2]
  end
  redis.call('HSET', key, unpack(given))
  return epoch
end
"""

OPEN = (
    HEAD
    + """
local epoch = number(redis.call('HGET', KEYS[1], 'epoch'))
if epoch == 0 then epoch = restart(KEYS[1], 0) end
return seen(KEYS[1], epoch)
"""
)
"""Return what is seen of a partition: its number, begun if need be, and positions."""

STAMP = (
    HEAD
    + """
local epoch = stamp(KEYS[1], ARGV[1])
local lease, lease_us = ARGV[2], tonumber(ARGV[3])
if lease_us > 0 then
  redis.call('HSET', KEYS[1], lease, text(epoch + lease_us))
elseif lease ~= '' then
  redis.call('HDEL', KEYS[1], lease)
end
return seen(KEYS[1], epoch)
"""
)
"""Stamp keys as written, and return what is seen of the partition then.

ARGV: buckets (none: all keys), and the name of a lease (empty: none) with its us, 0 to
end it.
"""

BACKFILL = (
    HEAD
    + """
local token, row_bytes, prefix = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local keys, buckets, rows, use = ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local last = number(redis.call('HGET', KEYS[1], 'epoch'))
if last < token or last == 0 then
  return {0, seen(KEYS[1], restart(KEYS[1], math.max(last, token)))}
end
local floors = redis.call('HMGET', KEYS[1], 'all', 'loading', 'moving')
local floor = math.max(number(floors[1]), number(floors[2]), number(floors[3]))
if floor > token then
  if floor > last and floor < now() then  -- a lease has passed
    last = now()
    redis.call('HSET', KEYS[1], 'epoch', text(last))
  end
  return {0, seen(KEYS[1], last)}
end
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
if #values == 0 then return {0, seen(KEYS[1], last)} end
if prefix == '' then
  redis.call('HSET', KEYS[2], unpack(values))
else
  redis.call('MSET', unpack(values))
end
if KEYS[3] and use == '0' then
  for i = 1, #uses, 2 do redis.call('HSETNX', KEYS[3], uses[i], use) end
elseif KEYS[3] then
  redis.call('HSET', KEYS[3], unpack(uses))
end
return {#values / 2, seen(KEYS[1], last)}
"""
)
"""Store rows whose keys were not written since ``token``.

KEYS: stamps; rows (any key of the slot, if rows are strings); and, if uses are noted,
their hash. ARGV: token, bytes of a row, prefix of row keys (empty if rows are fields),
keys, buckets, rows, and the use to note. Returns how many were stored, and
what is seen of the partition.
"""

SWAP = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
"""
"""Replace the value of a field if it is the given one; return whether it was."""
