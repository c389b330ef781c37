-- What a gateway asks of Redis, all in one call: rules.py, said again in Lua, on the server's clock.
--
-- KEYS[1]  a hash of all gateways: id -> when it was last heard of
-- KEYS[2]  what this gateway asked last, and what it was told: it asks again where it could not hear the answer
-- KEYS[3...]  the counters, one for each charge of ARGV[3...], in their order
-- ARGV[1]  the id of this gateway
-- ARGV[2]  the number of this call, the seconds after which a silent gateway counts as gone, and 1 as farewell
-- ARGV[3...]  orders: `T` and the charges to be taken together, `S` and one charge to be settled
--
-- Numbers travel as doubles of eight bytes: as text they would lose digits. The answer is one byte (1 where it is
-- that of an earlier call of the same number), the time, and for each `T` a byte (T taken, R refused, E error) and
-- for each of its charges a byte (1 where there was no room) and a record.

local write, read, floor = struct.pack, struct.unpack, math.floor

local MINUTE, DAY, AT_ONCE = 0, 1, 3  -- and 2, a month
local CHARGE, CHARGE_SIZE = '<BBdddd', 34  -- period, shadow, most, step, what comes back in it, cost
local SETTLING = '<Bdddddd'  -- period, step, what comes back in it, cost, actual, inflow and born of what was held
-- Seconds for which a counter of what is held at once is kept without use, and the last answer of a gateway. Counts
-- go when they are given back, or with their gateway: the first is for what a crash of all of them leaves.
local DAYS_OF_HOLDING, LAST_WORDS = 86400, 600
-- For how long a gateway's last call is remembered: longer than it is repeated (redis.py, _KEPT_FOR).
local LAST_CALL = 7200
-- For how many seconds at most a caller has to make up for what was used above its limit.
local OWED = 600
-- What a key may live at most, in milliseconds: ten years. (Redis refuses what it cannot add to its clock.)
local LONGEST = 315360000000

local function clock()
    local time = redis.call('TIME')
    return tonumber(time[1]) + tonumber(time[2]) / 1000000
end

local now = clock()

-- The beginning and the end of the day or month at hand, in UTC.
local function calendar(period)
    local day = floor(now / 86400)
    if period == DAY then
        return day * 86400, (day + 1) * 86400
    end
    -- Days since 0000-03-01, so that a leap day is a year's last; 146097 of them are 400 years.
    local days = day + 719468
    local of_era = days % 146097
    local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
    local of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
    local month = floor((5 * of_year + 2) / 153)  -- 0 is March
    local first = day - (of_year - floor((153 * month + 2) / 5))
    local length = 31
    if month == 11 then
        -- February is of the next year as people count: year + 1 is its number, in an era that begins at one of 400.
        local number = year + 1
        local leap = number % 4 == 0 and (number % 100 ~= 0 or number % 400 == 0)
        length = leap and 29 or 28
    elseif month == 1 or month == 3 or month == 6 or month == 8 then
        length = 30
    end
    return first * 86400, (first + length) * 86400
end

-- Keep a record for as long as it differs from none, and a second more.
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
    local live = math.min(math.max(floor((gone - now) * 1000), 0) + 1000, LONGEST)
    redis.call('SET', key, write('<dddd', level, since, inflow, born), 'PX', string.format('%.0f', live))
end

-- What is counted under a key by now: level, since, inflow, born. See Rule.at.
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
        -- Steps that a clock that was set back begins anew go on, whatever becomes of this order.
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
local number, patience, farewell = read('<ddB', ARGV[2])

-- What is held at once under a key: all of it, and how much of it by this gateway and since when. What a silent
-- gateway held does not count until it is heard of again, and is forgotten with it.
local function held(key)
    local counts = redis.call('HGETALL', key)
    local all, mine, born = 0, 0, now
    for place = 1, #counts, 2 do
        local count, since = read('<dd', counts[place + 1])
        if counts[place] == me then
            all, mine, born = all + count, count, since
        else
            local seen = redis.call('HGET', KEYS[1], counts[place])
            if not seen then
                redis.call('HDEL', key, counts[place])
            elseif math.abs(now - read('<d', seen)) <= patience then
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
    redis.call('EXPIRE', key, DAYS_OF_HOLDING)
end

-- Take all charges of an order, or, where one that is not in the shadow has no room, none.
local function take(order, first)
    local found, refused = {}, false
    for place = 0, (#order - 1) / CHARGE_SIZE - 1 do
        local period, shadow, most, step, per_step, cost = read(CHARGE, order, 2 + place * CHARGE_SIZE)
        local key = KEYS[first + place]
        local level, since, inflow, born, mine
        if period == AT_ONCE then
            level, mine, born = held(key)
            since, inflow = 0, 0
        else
            level, since, inflow, born = used(key, period, step, per_step)
            if period == MINUTE and level > most + OWED * per_step / step then  -- see Rule.at
                level = most + OWED * per_step / step
                keep(key, period, step, per_step, level, since, inflow, born)
            end
        end
        local over = cost ~= 0 and level + cost > most  -- nothing always has room
        refused = refused or (over and shadow == 0)
        found[place + 1] = {key, period, step, per_step, cost, over, level, since, inflow, born, mine}
    end
    local answer = {refused and 'R' or 'T'}
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
        answer[#answer + 1] = write('<Bdddd', over and 1 or 0, level, since, inflow, born)
    end
    return table.concat(answer)
end

-- Let what was really used take the place of what was taken. See Rule.settled.
local function settle(order, key)
    local period, step, per_step, cost, actual, held_inflow, held_born = read(SETTLING, order, 2)
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

-- A call that was heard before is not done again. One that arrives behind a later one comes from a connection that
-- was given up: what it asked for has been asked for again.
local before = redis.call('GET', KEYS[2])
if before then
    local latest = read('<d', before)
    if latest == number then
        return '\1' .. string.sub(before, 9)
    elseif latest > number then
        return redis.error_reply('LATE this call has been given up')
    end
end

-- (The first write is here: where Redis takes none - it is full, or a replica - nothing has been done.)
redis.call('SET', KEYS[2], write('<d', number), 'EX', LAST_CALL)
redis.call('HSET', KEYS[1], me, write('<d', now))
redis.call('EXPIRE', KEYS[1], LAST_WORDS)

local answer = {write('<d', now)}
local key = 3
for place = 3, #ARGV do
    local order = ARGV[place]
    if string.sub(order, 1, 1) == 'T' then
        local fine, made = pcall(take, order, key)
        local charges = (#order - 1) / CHARGE_SIZE
        answer[#answer + 1] = fine and made or 'E' .. string.rep('\0', 33 * charges)
        key = key + charges
    else
        pcall(settle, order, KEYS[key])
        key = key + 1
    end
end
answer = table.concat(answer)

if farewell == 1 then
    redis.call('HDEL', KEYS[1], me)
elseif #ARGV > 2 then
    redis.call('SET', KEYS[2], write('<d', number) .. answer, 'EX', LAST_CALL)
else
    -- Nothing was asked: there is time to forget the gateways that are gone for good.
    local gateways = redis.call('HGETALL', KEYS[1])
    for place = 1, #gateways, 2 do
        if now - read('<d', gateways[place + 1]) > LAST_WORDS then
            redis.call('HDEL', KEYS[1], gateways[place])
        end
    end
end
return '\0' .. answer
