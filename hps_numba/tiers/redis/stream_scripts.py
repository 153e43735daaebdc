"""The update stream in Redis: what many servers write of it, in any order.

Each partition has a hash of positions: how far its rows follow each partition of the
stream. All servers that share Redis write what they read of the stream, in pieces of
their own; the script refuses a piece that brings nothing newer than what is there.

Invariant: rows, stamps and position of a partition change at once. The rows are those
of a server that has applied the stream up to the position, but for what was evicted.
"""

from __future__ import annotations

from hps_numba.tiers.redis.scripts import HEAD

WRITTEN, KNOWN, GAP = 1, 0, -1  # what APPLY answers

APPLY = (
    HEAD
    + """
local function before(a, b)
  local offset, record = string.match(a, '(%d+):(%d+)')
  local other, its_record = string.match(b, '(%d+):(%d+)')
  offset, other = tonumber(offset), tonumber(other)
  if offset ~= other then return offset < other end
  return tonumber(record) < tonumber(its_record)
end
local field, since, till, buckets = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local puts, prefix, use, counts = ARGV[5] == 'put', ARGV[6], ARGV[7], ARGV[8] == '1'
local first, many = 9, 2048
local known = redis.call('HGET', KEYS[2], field)
local done = 1
if known and not before(known, till) then done = 0
elseif known and before(known, since) then done = -1 end
if done == 1 and ARGV[first] then
  stamp(KEYS[1], buckets)
  for i = first, #ARGV, many do
    local last = math.min(i + many - 1, #ARGV)
    if prefix ~= '' then
      redis.call(puts and 'MSET' or 'DEL', unpack(ARGV, i, last))
    else
      redis.call(puts and 'HSET' or 'HDEL', KEYS[3], unpack(ARGV, i, last))
    end
  end
end
if done == 1 and ARGV[first] and KEYS[4] then
  local skip = #prefix + 1
  for i = first, #ARGV, puts and 2 or 1 do
    local key = string.sub(ARGV[i], skip)
    if not puts then redis.call('HDEL', KEYS[4], key)
    elseif use == '0' then redis.call('HSETNX', KEYS[4], key, use)
    else redis.call('HSET', KEYS[4], key, use) end
  end
end
if done == 1 then redis.call('HSET', KEYS[2], field, till) end
local n_rows = 0
if counts then n_rows = redis.call('HLEN', prefix == '' and KEYS[3] or KEYS[4]) end
local number = redis.call('HGET', KEYS[1], 'epoch') or text(restart(KEYS[1], 0))
return {done, number, n_rows, redis.call('HGETALL', KEYS[2])}
"""
)
"""Write what a span of the stream brings to a partition, unless it is there already.

KEYS: stamps; positions; rows (any key of the slot, if rows are strings); and, if uses
are noted, their hash. ARGV: partition of the stream, where the span begins and ends,
buckets to stamp (none: all), ``put`` or ``drop``, prefix of row keys (empty if rows are
fields), the use to note, and 1 to count rows; then the names of rows, each followed by
the row if it is put.

Returns what was done, the partition's number, its rows if they were to be counted, and
all its positions. A span is ``KNOWN`` if it ends where the partition is or before, and
leaves a ``GAP`` if it begins beyond; then nothing is written. Positions are compared as
numbers of 53 bits.
"""
