-- One call of a gateway: token_bucket.py repeated in Lua, on the server's clock.
--
-- KEYS[1]  a hash of all gateways: id -> time of its last call
-- KEYS[2]  the number of this gateway's last call, and the reply: the gateway repeats a call whose reply was lost
-- KEYS[3...]  the counters, one for each charge of ARGV[3...], in the same order
-- ARGV[1]  the id of this gateway
-- ARGV[2]  the number of this call, the seconds of silence after which a gateway counts as gone, and 1 for a farewell
-- ARGV[3...]  orders: `T` and the charges to take together, or `S` and one charge to settle
--
-- Numbers are doubles of eight bytes: as text they would lose digits. The reply has one byte (1 if it repeats the
-- reply to an earlier call with the same number) and the time; then for each `T` a byte (T taken, R refused, E error)
-- and for each of its charges a byte (1 if there was no room) and a record.

local write, read, floor = struct.pack, struct.unpack, math.floor

local MINUTE, DAY, AT_ONCE = 0, 1, 3  -- and 2, a month
local CHARGE, CHARGE_SIZE = '<BBdddd', 34  -- period, shadow, max_level, refill interval, refill amount, cost
local SETTLEMENT = '<Bdddddd'  -- period, refill interval, refill amount, cost, actual, inflow and born of the take
-- Lifetime in seconds of an unused counter of concurrent use, and of the hash of gateways. Counts end when they are
-- given back, or with their gateway: the first lifetime is for a crash of all gateways.
local HELD_LIFETIME, GATEWAYS_LIFETIME = 86400, 600
-- Lifetime in seconds of a gateway's last call: longer than it is repeated (redis_counters.py, _MAX_PENDING_AGE).
local LAST_CALL_LIFETIME = 7200
-- Maximum debt of a caller, in seconds of refill.
local MAX_DEBT = 600
-- Maximum lifetime of a key, in milliseconds: ten years. (Redis rejects a number that it cannot add to its clock.)
local MAX_LIFETIME = 315360000000

local function clock()
    local time = redis.call('TIME')
    return tonumber(time[1]) + tonumber(time[2]) / 1000000
end

local now = clock()

-- The start and the end of the current day or month, in UTC.
local function calendar(period)
    local day = floor(now / 86400)
    if period == DAY then
        return day * 86400, (day + 1) * 86400
    end
    -- Days since 0000-03-01, so that a leap day is the last of a year; 146097 days are 400 years.
    local days = day + 719468
    local of_era = days % 146097
    local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
    local of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
    local month = floor((5 * of_year + 2) / 153)  -- 0 is March
    local first = day - (of_year - floor((153 * month + 2) / 5))
    local length = 31
    if month == 11 then
        -- February belongs to the next calendar year: year + 1, in an era that starts at a multiple of 400.
        local number = year + 1
        local leap = number % 4 == 0 and (number % 100 ~= 0 or number % 400 == 0)
        length = leap and 29 or 28
    elseif month == 1 or month == 3 or month == 6 or month == 8 then
        length = 30
    end
    return first * 86400, (first + length) * 86400
end

-- Keep a record for as long as it differs from an empty one, and a second more.
local function keep(key, period, step, per_step, level, since, inflow, born)
    if level <= 0 and period == MINUTE then
        redis.call('DEL', key)
        return
    end
    local gone
    if period == MINUTE then
        gone = since + math.ceil(level / per_step) * step
    else
        local _
        _, gone = calendar(period)
    end
    local live = math.min(math.max(floor((gone - now) * 1000), 0) + 1000, MAX_LIFETIME)
    redis.call('SET', key, write('<dddd', level, since, inflow, born), 'PX', string.format('%.0f', live))
end

-- The record of a key, refilled: level, since, inflow, born. See Limit.refill.
local function used(key, period, step, per_step)
    local level, since, inflow, born = 0, 0, 0, 0
    local text = redis.call('GET', key)
    if text then
        level, since, inflow, born = read('<dddd', text)
    end
    if period ~= MINUTE then
        local start = calendar(period)
        if since >= start then
            return level, since, inflow, born
        end
        return 0, start, 0, start
    end
    if level <= 0 then
        return 0, now, 0, now
    end
    if now < since then
        -- The clock was set back: restart the interval, even if this order is refused.
        keep(key, period, step, per_step, level, now, inflow, born)
        return level, now, inflow, born
    end
    local steps = floor((now - since) / step + 1e-9)
    if steps == 0 then
        return level, since, inflow, born
    end
    level = level - steps * per_step
    if level <= 0 then
        return 0, now, 0, now
    end
    return level, since + steps * step, inflow, born
end

local me = ARGV[1]
local number, gateway_timeout, farewell = read('<ddB', ARGV[2])

-- The concurrent use of a key: the total, and the part of this gateway with the time of its first use. The part of a
-- silent gateway does not count until its next call, and is deleted with the gateway.
local function held(key)
    local counts = redis.call('HGETALL', key)
    local all, mine, born = 0, 0, now
    for index = 1, #counts, 2 do
        local count, since = read('<dd', counts[index + 1])
        if counts[index] == me then
            all, mine, born = all + count, count, since
        else
            local seen = redis.call('HGET', KEYS[1], counts[index])
            if not seen then
                redis.call('HDEL', key, counts[index])
            elseif math.abs(now - read('<d', seen)) <= gateway_timeout then
                all = all + count
            end
        end
    end
    return all, mine, born
end

local function hold(key, count, born)
    if count <= 0 then
        redis.call('HDEL', key, me)
        return
    end
    redis.call('HSET', key, me, write('<dd', count, born))
    redis.call('EXPIRE', key, HELD_LIFETIME)
end

-- Take all charges of an order, or none if one (that is not a shadow charge) has no room.
local function take(order, first)
    local found, refused = {}, false
    for index = 0, (#order - 1) / CHARGE_SIZE - 1 do
        local period, shadow, max_level, step, per_step, cost = read(CHARGE, order, 2 + index * CHARGE_SIZE)
        local key = KEYS[first + index]
        local level, since, inflow, born, mine
        if period == AT_ONCE then
            level, mine, born = held(key)
            since, inflow = 0, 0
        else
            level, since, inflow, born = used(key, period, step, per_step)
            if period == MINUTE and level > max_level + MAX_DEBT * per_step / step then  -- see Limit.current
                level = max_level + MAX_DEBT * per_step / step
                keep(key, period, step, per_step, level, since, inflow, born)
            end
        end
        local over = cost ~= 0 and level + cost > max_level  -- a cost of 0 always has room
        refused = refused or (over and shadow == 0)
        found[index + 1] = {key, period, step, per_step, cost, over, level, since, inflow, born, mine}
    end
    local reply = {refused and 'R' or 'T'}
    for _, each in ipairs(found) do
        local key, period, step, per_step, cost, over, level, since, inflow, born, mine = unpack(each, 1, 11)
        if not refused and not over then
            level, inflow = level + cost, inflow + cost
            if period == AT_ONCE then
                hold(key, mine + cost, born)
            else
                keep(key, period, step, per_step, level, since, inflow, born)
            end
        end
        reply[#reply + 1] = write('<Bdddd', over and 1 or 0, level, since, inflow, born)
    end
    return table.concat(reply)
end

-- Replace the cost of a charge with its actual use. See Limit.settle.
local function settle(order, key)
    local period, step, per_step, cost, actual, held_inflow, held_born = read(SETTLEMENT, order, 2)
    if period == AT_ONCE then
        local _, mine, born = held(key)
        if actual >= cost or held_born == born then
            hold(key, mine + (actual - cost), born)
        end
        return
    end
    local level, since, inflow, born = used(key, period, step, per_step)
    if actual >= cost then
        level, inflow = level + (actual - cost), inflow + (actual - cost)
    elseif held_born == born then
        local back = cost - actual
        if period == MINUTE then
            back = math.min(back, math.max(0, held_inflow - (inflow - level)))
        end
        level = math.max(0, level - back)
    end
    keep(key, period, step, per_step, level, since, inflow, born)
end

-- A known call is not made again. A call that arrives after a later one comes from a connection that the gateway has
-- abandoned: its orders have been repeated.
local before = redis.call('GET', KEYS[2])
if before then
    local latest = read('<d', before)
    if latest == number then
        return '\1' .. string.sub(before, 9)
    elseif latest > number then
        return redis.error_reply('LATE the gateway has abandoned this call')
    end
end

-- (This is the first write: if Redis accepts none - it is full, or a replica - nothing has been done.)
redis.call('SET', KEYS[2], write('<d', number), 'EX', LAST_CALL_LIFETIME)
redis.call('HSET', KEYS[1], me, write('<d', now))
redis.call('EXPIRE', KEYS[1], GATEWAYS_LIFETIME)

local reply = {write('<d', now)}
local key = 3
for index = 3, #ARGV do
    local order = ARGV[index]
    if string.sub(order, 1, 1) == 'T' then
        local fine, made = pcall(take, order, key)
        local charges = (#order - 1) / CHARGE_SIZE
        reply[#reply + 1] = fine and made or 'E' .. string.rep('\0', 33 * charges)
        key = key + charges
    else
        pcall(settle, order, KEYS[key])
        key = key + 1
    end
end
reply = table.concat(reply)

if farewell == 1 then
    redis.call('HDEL', KEYS[1], me)
elseif #ARGV > 2 then
    redis.call('SET', KEYS[2], write('<d', number) .. reply, 'EX', LAST_CALL_LIFETIME)
else
    -- A heartbeat without orders has time to delete the gateways that are gone.
    local gateways = redis.call('HGETALL', KEYS[1])
    for index = 1, #gateways, 2 do
        if now - read('<d', gateways[index + 1]) > GATEWAYS_LIFETIME then
            redis.call('HDEL', KEYS[1], gateways[index])
        end
    end
end
return '\0' .. reply
